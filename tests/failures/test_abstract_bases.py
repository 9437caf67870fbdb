"""An abstract base cannot be built, nor can a class that leaves out what the base declares."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import pytest

import pcdyn
from pcdyn.errors import PcdynError
from pcdyn.model.energies.energy import LayerEnergies
from pcdyn.model.energies.generalised import Separable


def abstract_classes() -> dict[str, type]:
    """Every class of pcdyn that declares what a final class must have."""
    found = {}
    for module in pkgutil.walk_packages(pcdyn.__path__, "pcdyn."):
        if module.name.endswith("__main__"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and value.__module__.startswith("pcdyn") and missing(value):
                found[name] = value
    return found


def missing(cls: type) -> set[str]:
    """What a class declares and does not have."""
    names = ("__abstractmethods__", "__abstractvars__", "__abstractclassvars__")
    return set().union(*(getattr(cls, name, ()) for name in names))


BASES = abstract_classes()


def test_the_bases_are_those_that_the_architecture_names() -> None:
    expected = {"Energy", "Separable", "LayerEnergies", "Flow", "Integrator", "Solver", "Rule"}
    assert expected <= set(BASES)
    assert missing(LayerEnergies) == {"energies"}
    assert missing(Separable) == {"h"}


@pytest.mark.unchecked
@pytest.mark.parametrize("name", sorted(BASES))
def test_a_base_cannot_be_built(name: str) -> None:
    cls = BASES[name]
    # With what its constructor asks for, so that only being abstract can stand in the way.
    wanted = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is parameter.empty
    ]
    with pytest.raises(TypeError, match="abstract"):
        cls(**dict.fromkeys(wanted))


@pytest.mark.unchecked
def test_an_energy_without_the_method_of_its_base_cannot_be_built() -> None:
    class Forgetful(Separable):
        def value(self, error: Any, target: Any) -> Any:
            return error @ error

    with pytest.raises(TypeError, match=r"abstract method '?h\b"):
        Forgetful()


@pytest.mark.unchecked
def test_a_result_without_the_field_of_its_base_cannot_be_built() -> None:
    class Empty(LayerEnergies):
        pass

    with pytest.raises(TypeError, match=r"abstract.*energies"):
        Empty()


def test_all_named_errors_are_of_one_family() -> None:
    for name, value in vars(pcdyn.errors).items():
        if inspect.isclass(value) and issubclass(value, Exception) and "Warning" not in name:
            assert issubclass(value, PcdynError), name
