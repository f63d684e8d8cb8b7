"""Reads a Hugging Face decoder config, and has clear words for what is not one."""

from fourfold.layouts.inputs.config_reader import Config, ConfigReader
from fourfold.layouts.inputs.defaults import OWN, ROTARY_SHARE, nested_sizes
from fourfold.layouts.inputs.families import DEFAULTS, FLAT, READERS, SAME_AS, TEXT_OF
from fourfold.layouts.inputs.model import ModelConfig
from fourfold.layouts.inputs.reading import shown

_ENCODERS = ("bert", "roberta", "distilbert", "albert", "electra", "deberta", "vit", "clip", "t5", "bart", "whisper")


def model_from_config(config: Config, *, name: str = "") -> ModelConfig:
    """Read a Hugging Face config; of a model with several kinds of input, its decoder's text_config.

    What a text_config leaves out has transformers' defaults, sizes too; `config` of the result states them.

    Raises:
        ValueError: an encoder, an unknown family, or a missing or senseless field; names it.
    """
    kind = config.get("model_type")
    title = name or str(config.get("_name_or_path") or shown(kind or "model").strip("'"))
    title = " ".join(title.split("\n"))
    known = ", ".join(sorted(READERS))
    if kind is None:
        raise ValueError(f"{title}: the config has no 'model_type': add it (one of {known})")
    if not isinstance(kind, str):
        raise ValueError(f"{title}: model_type={shown(kind)}, but it is a word; known are {known}")
    if "text_config" in config and kind not in READERS:
        return _nested(config, kind, title)
    if kind in FLAT:
        inner = {key: value for key, value in config.items() if key != "vision_config"}
        return model_from_config({**inner, "model_type": TEXT_OF[kind]}, name=title)
    family = SAME_AS.get(kind, kind)
    if family not in READERS:
        if any(kind.startswith(word) for word in _ENCODERS) or config.get("is_encoder_decoder"):
            raise ValueError(
                f"{title}: model_type={shown(kind)} is not a decoder-only language model; these are: {known}"
            )
        raise ValueError(f"{title}: model_type={shown(kind)} is not known here; these are: {known}")
    read = ConfigReader(config, title, {**DEFAULTS[family], **OWN.get(kind, {})})
    read.check_shared()
    fields = READERS[family](read)
    read.check_layers(fields["num_layers"], linear="linear" in fields, chunked=family == "llama4_text")
    if fields.get("rotary", True) and family not in ROTARY_SHARE:
        latent = fields.get("latent")
        read.check_rotation(fields["head_dim"] if latent is None else latent.rope_dim)
    return ModelConfig(name=title, config=dict(config), **fields)


def _nested(config: Config, kind: str, title: str) -> ModelConfig:
    text = config["text_config"]
    if not isinstance(text, dict) or "text_config" in text:
        raise ValueError(f"{title}: text_config={shown(text)}, but it is the config of a decoder")
    if config.get("is_encoder_decoder") is True:
        raise ValueError(f"{title}: has cross-attention to an encoder: not a decoder-only language model")
    own = text.get("model_type")
    if own is None:
        if kind not in TEXT_OF:
            raise ValueError(f"{title}: text_config has no 'model_type': add the decoder's")
        own = TEXT_OF[kind]
    inner = {**(nested_sizes(own) if isinstance(own, str) else {}), **text, "model_type": own}
    if "tie_word_embeddings" not in inner and config.get("tie_word_embeddings") is not None:
        inner["tie_word_embeddings"] = config["tie_word_embeddings"]
    return model_from_config(inner, name=title)
