"""What several tests share: pools of ranks, cases, tiny models."""
