"""A Hugging Face decoder on a (dp, pp, cp, tp) mesh: the other packages in one place."""

from typing import TYPE_CHECKING

from fourfold.parallel.lazy import exported

if TYPE_CHECKING:
    from fourfold.parallel.decoder.async_pipeline import decoder_stages as decoder_stages
    from fourfold.parallel.decoder.async_pipeline import pipeline_decoder as pipeline_decoder
    from fourfold.parallel.decoder.balance import cut_decoder_into_stages as cut_decoder_into_stages
    from fourfold.parallel.decoder.balance import cut_into_stages as cut_into_stages
    from fourfold.parallel.decoder.parallel_model import ParallelModel as ParallelModel
    from fourfold.parallel.decoder.parallelism_config import from_parallelism_config as from_parallelism_config

__getattr__, __dir__, __all__ = exported(
    __name__,
    {
        "ParallelModel": "parallel_model",
        "cut_decoder_into_stages": "balance",
        "cut_into_stages": "balance",
        "decoder_stages": "async_pipeline",
        "from_parallelism_config": "parallelism_config",
        "pipeline_decoder": "async_pipeline",
    },
)
