"""Models, tokenizers and texts from what a user names, or one line that says what is wrong with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elision.errors import InputError
from elision.families import TREATED, check_original, load_config, model_path, refusal

_WHOLE = ("embed_tokens.weight", "lm_head.weight")  # that PEFT may save beside an adapter
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(source: str, dtype: str = "float32") -> tuple[Any, Any]:
    """(model, tokenizer) of a directory, a Hugging Face id or "reference", in eval mode.

    Raises:
        InputError: no such model, an unsupported family, weights that are missing or truncated or were made for an SPD
            plan, no tokenizer.
    """
    from transformers import AutoModelForCausalLM

    precision = named_dtype(dtype)
    config = load_config(source)
    if reason := refusal(config, "sparselora"):  # the wider of the two methods: what it cannot view, neither can
        raise InputError(reason)
    check_original(config, source)
    model = load_whole(AutoModelForCausalLM, model_path(source), source, dtype=precision or "auto")
    return model, load_tokenizer(source)


def load_whole(kind: Any, path: str | Path, source: str, **options: Any) -> Any:
    """`kind.from_pretrained(path, **options)`, with every tensor read from there; errors name `source`.

    Raises:
        InputError: weights are missing, truncated or of another shape. transformers fills a tensor that a checkpoint
            lacks with random numbers and only warns.
    """
    try:
        model, info = kind.from_pretrained(path, output_loading_info=True, **options)
    except Exception as error:  # safetensors, the hub client and config classes share no error class
        raise InputError(
            f"weights of model {source} cannot be read ({_line(error)}): fetch or save it again"
        ) from error
    absent = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise InputError(
            f"weights of model {source} lack {absent[0]}{more} as the model needs it: fetch or save it again"
        )
    return model


def named_dtype(name: str) -> Any:
    """The torch dtype of that name; None for "auto", which is the checkpoint's own.

    Raises:
        InputError: it is none of DTYPES.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known: use {', '.join(DTYPES)}")
    return None if name == "auto" else getattr(torch, name)


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a directory, a Hugging Face id or "reference".

    Raises:
        InputError: there is none, or one that cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        with _no_false_alarm():
            return AutoTokenizer.from_pretrained(model_path(source))
    except Exception as error:  # as above
        raise InputError(f"tokenizer of model {source} cannot be read ({_line(error)}): save it beside it") from error


@contextmanager
def _no_false_alarm() -> Iterator[None]:
    """Keep transformers, which reads a tokenizer's class from the config, from warning of a treated checkpoint's type.

    No model is made from that config; every other message passes.
    """

    def passes(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(f"You are using a model of type `{TREATED}")

    logger = logging.getLogger("transformers.configuration_utils")
    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


def load_adapter(model: Any, path: Path) -> Any:
    """`model` with the PEFT adapter of `path` merged into it.

    Raises:
        InputError: as `with_adapter` does.
    """
    return with_adapter(model, path).merge_and_unload()


def with_adapter(model: Any, path: Path, *, trainable: bool = False) -> Any:
    """`model` with the PEFT adapter of `path` beside it, unmerged.

    Raises:
        InputError: no adapter there, one that cannot be read, or one that does not fit the model, in part or at all.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    if not (path / "adapter_config.json").is_file():
        raise InputError(f"adapter {path} holds no adapter_config.json: give the directory of a PEFT adapter")
    weights = path / "adapter_model.safetensors"
    if not weights.is_file():  # PEFT would ask the hub for it
        raise InputError(f"adapter {path} holds no {weights.name}: save it again, with save_pretrained")
    try:
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
    except Exception as error:  # safetensors' own error class is not public
        raise InputError(f"adapter {path}: {weights.name} cannot be read ({_line(error)}): save it again") from error
    misfit = f"adapter {path} does not fit the model"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # a page long; below it is a sentence
            adapted = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except Exception as error:  # peft raises what its config and torch raise
        raise InputError(f"{misfit} ({_line(error)}): give the one made for it") from error
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if missing := sorted(wanted - stored):
        raise InputError(f"{misfit}, for which it lacks {missing[0]}: give the one made for it")
    if unknown := sorted(name for name in stored - wanted if not name.endswith(_WHOLE)):
        raise InputError(f"{misfit}, which has no place for {unknown[0]}: give the one made for it")
    return adapted


def load_texts(paths: Sequence[str | Path]) -> list[str]:
    """The texts of files, one each.

    Raises:
        InputError: a path that is no file, not UTF-8 or empty.
    """
    texts = []
    for path in map(Path, paths):
        try:
            texts.append(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
        except OSError:
            raise InputError(f"text {path} cannot be read: give a plain text file") from None
        except UnicodeDecodeError:
            raise InputError(f"text {path} is not UTF-8: give a plain text file") from None
        if not texts[-1].strip():
            raise InputError(f"text {path} is empty: give a file with text")
    return texts


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
