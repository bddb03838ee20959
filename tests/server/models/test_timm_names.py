import pytest

import tome_server.merging.timm_import  # noqa: F401  isort: skip
import timm
from timm.models import is_model

from tome_server.errors import ModelLoadError
from tome_server.models import timm_names
from tome_server.models.timm_names import architectures, check_architecture


def test_the_names_in_timms_source_are_those_that_it_registers() -> None:
    names = architectures()
    assert set(timm.list_models()) <= names
    assert all(is_model(name) for name in names)


def test_a_name_that_timm_has_is_taken_whatever_its_tag() -> None:
    for name in ("vit_base_patch16_224", "vit_base_patch16_224.augreg_in21k", "deit3_base_patch16_224.mine"):
        check_architecture(name)


def test_a_name_that_timm_once_had_is_taken() -> None:
    assert "vit_base_patch16_224_in21k" in architectures()
    check_architecture("vit_base_patch16_224_in21k")


def test_another_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ModelLoadError, match=r"no model named 'vit_bas_patch16_224'; did you mean vit_base_patch16_224"
    ):
        check_architecture("vit_bas_patch16_224")


def test_a_source_that_does_not_show_the_names_leaves_the_question_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_names, "architectures", frozenset)
    check_architecture("anything")
