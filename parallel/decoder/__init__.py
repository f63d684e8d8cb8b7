"""A Hugging Face decoder on a (dp, pp, cp, tp) mesh: the other packages in one place."""
