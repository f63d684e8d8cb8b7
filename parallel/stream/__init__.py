"""StreamBP: exact backpropagation in sequence chunks (Luo et al. 2025)."""

from typing import TYPE_CHECKING

from fourfold.parallel.lazy import exported

if TYPE_CHECKING:
    from fourfold.parallel.stream.losses import dpo_loss as dpo_loss
    from fourfold.parallel.stream.losses import grpo_loss as grpo_loss
    from fourfold.parallel.stream.losses import kto_loss as kto_loss
    from fourfold.parallel.stream.losses import sft_loss as sft_loss
    from fourfold.parallel.stream.memory import StreamMemory as StreamMemory
    from fourfold.parallel.stream.memory import max_seq_len as max_seq_len
    from fourfold.parallel.stream.memory import stream_memory as stream_memory
    from fourfold.parallel.stream.model import stream_backprop as stream_backprop
    from fourfold.parallel.stream.model import stream_backprop_disable as stream_backprop_disable
    from fourfold.parallel.stream.model import streamed_layers as streamed_layers
    from fourfold.parallel.stream.settings import StreamSettings as StreamSettings
    from fourfold.parallel.stream.statistics import TokenStatistics as TokenStatistics
    from fourfold.parallel.stream.statistics import token_logprobs as token_logprobs
    from fourfold.parallel.stream.statistics import token_statistics as token_statistics

__getattr__, __dir__, __all__ = exported(
    __name__,
    {
        "StreamMemory": "memory",
        "StreamSettings": "settings",
        "TokenStatistics": "statistics",
        "dpo_loss": "losses",
        "grpo_loss": "losses",
        "kto_loss": "losses",
        "max_seq_len": "memory",
        "sft_loss": "losses",
        "stream_backprop": "model",
        "stream_backprop_disable": "model",
        "stream_memory": "memory",
        "streamed_layers": "model",
        "token_logprobs": "statistics",
        "token_statistics": "statistics",
    },
)
