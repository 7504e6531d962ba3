"""Facts about the machine, also when the runtime is missing."""

from __future__ import annotations

import json

import pytest

from onnxprune.errors import InputError, RuntimeUnavailable
from onnxprune.runtime import environment
from onnxprune.runtime.environment import describe, providers_that_start


def test_the_description_is_json_and_complete() -> None:
    facts = json.loads(json.dumps(describe()))
    assert facts["cores"] >= 1
    assert facts["conflicts"] == []
    assert "CPUExecutionProvider" in facts["providers_available"]
    assert facts["distributions"]["onnxruntime"] == facts["onnxruntime"]
    assert facts["cpu"]


def test_a_missing_runtime_is_a_conflict_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeUnavailable("onnxruntime is not installed")

    monkeypatch.setattr(environment, "require_onnxruntime", missing)
    facts = describe()
    assert facts["conflicts"] == ["onnxruntime is not installed"]
    assert facts["onnxruntime"] is None
    with pytest.raises(RuntimeUnavailable):
        providers_that_start()


def test_the_cpu_starts() -> None:
    assert providers_that_start()["CPUExecutionProvider"] == "ok"


@pytest.mark.parametrize("error", [RuntimeUnavailable("did not start"), InputError("kernel missing")])
def test_a_provider_that_does_not_start_gets_its_reason(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(model: object, options: object) -> None:
        raise error

    monkeypatch.setattr(environment, "open_session", refuse)
    assert providers_that_start()["CPUExecutionProvider"] == str(error)
