"""What a model folder can be exported for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.errors import InputError
from onnxprune.export.folder import ModelFolder

AUTO = "auto"


@dataclass(frozen=True)
class Task:
    """``auto_class`` loads it; ``endings`` are those of the class names that config.json names for it; ``outputs`` are graph outputs."""

    name: str
    auto_class: str
    endings: tuple[str, ...]
    outputs: tuple[str, ...]


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("encoder", "AutoModel", ("Model",), ("last_hidden_state",)),
        Task("sequence-classification", "AutoModelForSequenceClassification", ("ForSequenceClassification",), ("logits",)),
        Task("token-classification", "AutoModelForTokenClassification", ("ForTokenClassification",), ("logits",)),
        Task("question-answering", "AutoModelForQuestionAnswering", ("ForQuestionAnswering",), ("start_logits", "end_logits")),
        Task("embedding", "AutoModel", (), ("sentence_embedding",)),
        Task("image-classification", "AutoModelForImageClassification", ("ForImageClassification",), ("logits",)),
        Task("causal-lm", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), ("logits",)),
    )
}


def choose_task(folder: ModelFolder, asked: str = AUTO) -> Task:
    """The task asked for, or the one that the folder was saved for.

    A bare encoder with a sentence-transformers modules.json is an embedding.

    Raises:
        InputError: no such task, or none fits the class that config.json names.
    """
    if asked != AUTO:
        if asked not in TASKS:
            near = difflib.get_close_matches(asked, TASKS, 1)
            raise InputError(f"unknown task {asked!r}{f'; did you mean {near[0]!r}?' if near else ''}; known: {', '.join(TASKS)}")
        return TASKS[asked]
    name = folder.architecture
    fitting = {ending: task for task in TASKS.values() for ending in task.endings if name.endswith(ending)}
    found = fitting[max(fitting, key=len)] if fitting else None  # GPT2LMHeadModel is more than a Model
    if found is None:
        raise InputError(
            f"{folder.path / 'config.json'} names {f'the class {name}' if name else 'no class'}, which tells no task; "
            f"say it with --task: {', '.join(TASKS)}"
        )
    return TASKS["embedding"] if found.name == "encoder" and folder.modules else found
