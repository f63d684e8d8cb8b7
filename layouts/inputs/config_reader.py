"""Typed access to the fields of a Hugging Face config; every complaint names the field, the value and the model.

A field that is absent has the default of its family in transformers (`defaults`, held against transformers by a test);
one that is null is as if the model did not have it.
"""

from collections.abc import Mapping
from typing import Any

from fourfold.layouts.inputs.reading import MOST, number, shown

Config = Mapping[str, Any]
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")


class ConfigReader:
    """Fields of one config, under one family's defaults."""

    def __init__(self, config: Config, name: str, defaults: Config) -> None:
        self.config = config
        self.name = name
        self.defaults = defaults

    def get(self, key: str) -> Any:
        return self.config.get(key, self.defaults.get(key))

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"{self.name}: {reason}")

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A field under the name that the config has it by, of those it may have; else the family's default."""
        stated = [key for key in keys if key in self.config]
        first, *others = [key for key in stated if self.config[key] is not None] or [""]
        for key in others:
            if self.config[key] != self.config[first]:
                raise self.refuse(
                    f"{first}={shown(self.config[first])} and {key}={shown(self.config[key])} are one field under two "
                    "names: give one of them"
                )
        for key in stated or keys:
            value = self.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise self.refuse(f"{key}={shown(value)}, but it is a whole number of at least {least}")
            if value > MOST:
                raise self.refuse(f"{key}={shown(value)}, but it is at most {MOST}")
            return value
        if default is None:
            raise self.refuse(f"the config has no {keys[0]!r}: add it (a whole number of at least {least})")
        return default

    def flag(self, key: str, *, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(f"{key}={shown(value)}, but it is true or false")
        return value

    def check_shared(self) -> None:
        """Refuse what no family can have in the fields that a runtime reads besides those of a count."""
        tables: list[Config] = [self.config]
        for key in ("rope_parameters", "rope_scaling"):
            value = self.get(key)
            if value is not None and not isinstance(value, Mapping):
                raise self.refuse(f"{key}={shown(value)}, but it is an object with a rope_type")
            tables += [value, *(kind for kind in value.values() if isinstance(kind, Mapping))] if value else []
        for table in tables:
            for key in ("rope_type", *(["type"] if table is not self.config else [])):
                if not isinstance(table.get(key) or "", str):
                    raise self.refuse(f"{key}={shown(table[key])}, but it is a word")
            for key in ("rope_theta", "rotary_emb_base"):
                if table.get(key) is not None:
                    number(table[key], f"{self.name}: {key}")
            for key in ("attention_dropout", "partial_rotary_factor", "rotary_pct"):
                if table.get(key) is not None:
                    number(table[key], f"{self.name}: {key}", zero=True, most=1.0)
        if not isinstance(self.get("hidden_act") or "", str):
            raise self.refuse(f"hidden_act={shown(self.get('hidden_act'))}, but it is a word")

    def check_layers(self, num_layers: int, *, linear: bool, chunked: bool) -> None:
        """Refuse layer types that do not count the layers, or that the family does not have."""
        types = self.layer_types(num_layers) or []
        for word, has in (("linear_attention", linear), ("chunked_attention", chunked)):
            if word in types and not has:
                raise self.refuse(f"layer_types has {word!r}, which models of this family do not have")

    def check_rotation(self, width: int) -> None:
        """Refuse heads of an odd width: a rotary embedding turns pairs. One that turns a part of them may be even."""
        tables = [self.config, self.get("rope_parameters") or {}, self.get("rope_scaling") or {}]
        if width % 2 and not any("partial_rotary_factor" in table for table in tables):
            raise self.refuse(f"heads of width {width} have no pairs for a rotary embedding: give an even head_dim")

    def layers_in(self, key: str, num_layers: int) -> list[int]:
        """A list of layers' numbers; those past the last layer count for nothing."""
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple) or not all(
            isinstance(layer, int) and not isinstance(layer, bool) for layer in value
        ):
            raise self.refuse(f"{key}={shown(value)}, but it is a list of layers' numbers")
        return sorted({layer for layer in value if 0 <= layer < num_layers})

    def layer_types(self, num_layers: int) -> list[str] | None:
        """The kind of attention of each layer; None where the config leaves it to the family."""
        value = self.get("layer_types")
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.refuse(f"layer_types={shown(value)}, but it is a list with a word for each layer")
        if len(value) != num_layers:
            raise self.refuse(f"layer_types has {len(value)} words for {num_layers} layers: give one for each")
        for word in value:
            if word not in LAYER_TYPES:
                raise self.refuse(f"layer_types has {shown(word)}; known are {', '.join(LAYER_TYPES)}")
        return list(value)

    def head_dim(self, hidden: int, heads: int) -> int:
        """Width of a head: stated, the family's, or what hidden_size leaves each head."""
        if self.get("head_dim") is not None:
            return self.whole("head_dim")
        if hidden % heads:
            raise self.refuse(
                f"hidden_size={hidden} is no multiple of num_attention_heads={heads}: "
                "change one of them, or give head_dim"
            )
        return hidden // heads

    def common(self) -> dict[str, Any]:
        """Fields that Llama-like families share."""
        if self.flag("add_cross_attention") or self.flag("is_encoder_decoder"):
            raise self.refuse("has cross-attention to an encoder: not a decoder-only language model")
        hidden, heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        return {
            "hidden_size": hidden,
            "num_layers": self.whole("num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": self.whole("num_key_value_heads", default=heads),
            "head_dim": self.head_dim(hidden, heads),
            "vocab_size": self.whole("vocab_size"),
            "tied_embeddings": self.flag("tie_word_embeddings"),
            "max_seq_len": self.whole("max_position_embeddings", default=0, least=0),
        }

    def window(self, num_layers: int, windowed: int, *, kind: str = "sliding_attention") -> dict[str, Any]:
        """The sliding window and how many layers have it: those that layer_types names, else `windowed` of them."""
        size = self.whole("sliding_window", default=0, least=0)
        types = self.layer_types(num_layers)
        if types is not None:
            windowed = sum(word == kind for word in types)
        return {"sliding_window": size, "num_windowed_layers": windowed} if size and windowed else {}

    def experts(self, num_layers: int, moe_layers: int, *, width: str) -> dict[str, Any]:
        """Routed experts of `moe_layers` layers, whose width is in the field `width`."""
        count = self.whole("num_local_experts", "num_experts", "n_routed_experts")
        chosen = self.whole("num_experts_per_tok")
        if chosen > count:
            raise self.refuse(f"num_experts_per_tok={chosen} of {count} experts: give at most as many as there are")
        return {
            "num_experts": count, "experts_per_token": chosen, "expert_ffn_size": self.whole(width),
            "num_moe_layers": moe_layers,
            "ffn_size": self.whole("intermediate_size", default=0 if moe_layers == num_layers else None),
        }  # fmt: skip
