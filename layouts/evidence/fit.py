"""Everything that is fitted to measured runs, under one roof: physical constants, and those of one published study."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from fourfold.layouts.evidence.study import StudyConstants, study_constants
from fourfold.layouts.inputs.constants import Constants, constants_from, constants_to, shipped_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants by name: "matmul_half", "matmul_peaks.A100" (of one device), "study.sends_share"."""

    constants: Constants
    study: StudyConstants

    def get(self, name: str) -> float:
        holder, _, key = name.partition(".")
        if holder == "study":
            return float(getattr(self.study, key))
        value = getattr(self.constants, holder)
        return float(value[key] if key else value)

    def with_values(self, values: Mapping[str, float]) -> "Fit":
        """The same with some replaced."""
        peaks = dict(self.constants.matmul_peaks)
        plain: dict[str, Any] = {}
        study: dict[str, float] = {}
        for name, value in values.items():
            holder, _, key = name.partition(".")
            if holder == "study":
                study[key] = value
            elif key:
                peaks[key] = value
            else:
                plain[holder] = value
        constants = replace(self.constants, matmul_peaks=peaks, **plain)
        return Fit(constants=constants, study=replace(self.study, **study))

    def as_dict(self) -> dict[str, Any]:
        """The tables of data/constants.toml."""
        return {"constants": constants_to(self.constants), "study": asdict(self.study)}


def fit_from(document: Mapping[str, Any]) -> Fit:
    """A fit from the tables of data/constants.toml."""
    return Fit(constants=constants_from(document["constants"]), study=study_constants(document["study"]))


def load_fit() -> Fit:
    """What is shipped in data/constants.toml: `prior` fitted to published runs."""
    return fit_from(shipped_table("constants"))


def load_prior_fit() -> Fit:
    """Before any fit, from data/prior.toml."""
    return fit_from(shipped_table("prior"))
