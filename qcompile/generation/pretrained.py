"""Models by name: a local folder, a GGUF file, a hub id when online, or the embedded one.

Reading files is transformers' work; this file only finds them and says what is missing.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.checkpoint.folder_meta import META
from qcompile.checkpoint.gguf_reads import parsed_once
from qcompile.checkpoint.save_load import load
from qcompile.checkpoint.stored_files import safetensors_of, stored_tensors
from qcompile.checkpoint.stored_gguf import stored_gguf
from qcompile.generation.embedded_models import embedded, embedded_encoder
from qcompile.generation.model_files import check_files, check_gguf, check_sizes
from qcompile.generation.model_name import ModelNotFound as ModelNotFound
from qcompile.generation.model_name import require_model

GGUF = ".gguf"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_encoder(name: str = "") -> tuple[nn.Module, Any]:
    """Load a model without a head, float32, and its tokenizer.

    Args:
        name: a folder, a hub id, or "" for the embedded encoder.

    Returns:
        The model, for inference, and the tokenizer.

    Raises:
        ModelNotFound: nothing there, damaged files or other tensors than the model's, or transformers is missing.
    """
    source = name or str(embedded_encoder())
    _transformers()
    require_model(source)
    if (Path(source) / META).is_file():
        raise ModelNotFound(f"{source} is quantized already. Fix: read it with qcompile.load, or give the float model")
    return _from_pretrained(_headless_class, source, torch.float32)


def load_pretrained(
    name: str = "", dtype: torch.dtype | None = torch.float32, *, any_class: bool = False, stream: bool = False
) -> tuple[nn.Module, Any]:
    """Load a causal LM and its tokenizer.

    Args:
        name: a folder (also a checkpoint of qcompile.save), a .gguf file, a hub id, or "" for the embedded model.
        dtype: of the weights; None: the one that config.json names.
        any_class: load a model that generates no text too, as its own class: a classifier stays one.
        stream: leave the weights of a folder of safetensors files, or of a .gguf file, there; each is read when it is
            needed.

    Returns:
        The model, for inference, and the tokenizer.

    Raises:
        ModelNotFound: nothing there, damaged files, other tensors than the model's, a model of another kind, or
            transformers is missing.
    """
    path = embedded() if not name else Path(name)
    if path.suffix == GGUF:
        return _from_gguf(path, dtype, stream=stream)
    _transformers()
    require_model(name)
    if (path / META).is_file():
        model = load(path, stream=stream)
        _require_causal(type(model), getattr(model, "config", None), name, any_class)
        return model, _tokenizer(name)
    return _from_pretrained(lambda config: _own_class(config, name, any_class), name, dtype, stream=stream)


def load_in_parts(folder: str | Path, dtype: torch.dtype | None = None) -> tuple[nn.Module, Any]:
    """The model of safetensors files, of its own class, or of a GGUF file; the weights stay there. And its tokenizer.

    Args:
        folder: of transformers, or a .gguf file.
        dtype: of the weights, which are cast as they are read; None: the one that config.json names.

    Returns:
        The model, for inference, and the tokenizer; None where there is no file of one.

    Raises:
        ModelNotFound: as of `load_pretrained`.
    """
    name = str(folder)
    if Path(folder).suffix == GGUF:
        return _from_gguf(Path(folder), dtype, stream=True, needs_tokenizer=False)
    require_model(name)
    if (Path(folder) / META).is_file():
        raise ModelNotFound(f"{name} is quantized already. Fix: give the folder of the float model")
    has_tokenizer = any((Path(folder) / file).is_file() for file in _TOKENIZER_FILES)
    return _from_pretrained(
        lambda config: _own_class(config, name, True), name, dtype, stream=True, tokenizer=has_tokenizer
    )


def _from_gguf(
    path: Path, dtype: torch.dtype | None, *, stream: bool, needs_tokenizer: bool = True
) -> tuple[nn.Module, Any]:
    """The causal LM of a GGUF file and its tokenizer; None if it has none and needs none."""
    if not path.is_file():
        raise ModelNotFound(f"there is no file {path}. Fix: check the path")
    auto = _transformers().AutoModelForCausalLM
    class_of = (lambda config: type(_on_meta(auto, config))) if stream else (lambda config: auto)
    with _as_not_found(str(path)):
        check_gguf(path)
        with parsed_once() as parsed:
            tokenizer = needs_tokenizer or "tokenizer.ggml.tokens" in parsed(str(path)).fields
            return _from_pretrained(class_of, str(path.parent), dtype, path.name, stream=stream, tokenizer=tokenizer)


def _own_class(config: Any, name: str, any_class: bool) -> Any:
    """The class that a configuration names, which is the one that its weights are of."""
    transformers = _transformers()
    names = config.architectures
    if not names or getattr(config, "auto_map", None):
        return transformers.AutoModelForCausalLM
    cls = getattr(transformers, names[0], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ModelNotFound(f"{name} is a {names[0]}, which transformers {transformers.__version__} does not have")
    if not isinstance(config, getattr(cls, "config_class", type(config))):
        raise ModelNotFound(f"{name} is damaged: its config.json is of {config.model_type}, and names {names[0]}")
    _require_causal(cls, config, name, any_class)
    return cls


def _headless_class(config: Any) -> Any:
    return _transformers().AutoModel


def _require_causal(cls: Any, config: Any, name: str, any_class: bool) -> None:
    generates = bool(getattr(cls, "can_generate", bool)()) and not getattr(config, "is_encoder_decoder", False)
    if not (any_class or generates):
        raise ModelNotFound(
            f"{name} is a {cls.__name__}, and no causal LM: it generates no text. Fix: give a causal LM, or quantize "
            "it (`qcompile quantize`, load_pretrained(.., any_class=True))"
        )


def _from_pretrained(
    class_of: Callable[[Any], Any],
    source: str,
    dtype: torch.dtype | None,
    gguf_file: str = "",
    *,
    stream: bool = False,
    tokenizer: bool = True,
) -> tuple[nn.Module, Any]:
    """A model by transformers, for inference, and its tokenizer; with every tensor from the files, and none left over.

    Args:
        class_of: a configuration -> the class to load, or an Auto class.
        source: a folder or a hub id.
        dtype: of the weights; None: as in the configuration.
        gguf_file: the file in the folder; "" for a folder of safetensors.
        stream: whether the weights stay in the folder.
        tokenizer: whether there is one to read.
    """
    transformers = _transformers()
    name = f"{source}/{gguf_file}" if gguf_file else source
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    with _silent(), _as_not_found(name):
        if not gguf_file and Path(source).exists():
            check_files(Path(source))
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
        cls = class_of(config)
        if not gguf_file and Path(source).is_dir():
            check_sizes(Path(source), cls, config)
        options: dict[str, Any] = dict(
            dtype=dtype or "auto", output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
        )
        place = [None] if stream else [source]
        if stream:
            options |= {"config": config, "state_dict": _stored(Path(source), gguf_file, cls, config)}
        else:
            options |= gguf
        model, info = cls.from_pretrained(*place, **options)
        if info["missing_keys"] and all(key.startswith("pooler.") for key in info["missing_keys"]):
            model, info = cls.from_pretrained(*place, **options, add_pooling_layer=False)
        if stream and hasattr(model, "generation_config"):
            model.generation_config = _generation_config(source, model.config if gguf_file else None)
        other_class = type(model).__name__ not in (config.architectures or ())
        _refuse_other_tensors(name, info, with_head=other_class and cls is transformers.AutoModel)
        read = _tokenizer(source, **gguf) if tokenizer else None
    if gguf:  # its weights were dequantized while loading: it is saved like any other model
        model.hf_quantizer, model.is_quantized = None, False
        model.config.__dict__.pop("quantization_config", None)
    return model.requires_grad_(False).eval(), read


def _stored(folder: Path, gguf_file: str, cls: Any, config: Any) -> dict[str, Any]:
    """The tensors of a folder, or of a GGUF file in it, which stay there."""
    if not gguf_file:
        return stored_tensors(safetensors_of(folder))
    return stored_gguf(folder / gguf_file, _on_meta(cls, config))


def _on_meta(cls: Any, config: Any) -> Any:
    """A model without values, of a class or an Auto class."""
    with torch.device("meta"):
        return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)


def _generation_config(source: str, config: Any = None) -> Any:
    """What `from_pretrained` reads: of a folder without a file for it, what its config.json says of generating.

    Args:
        source: the folder.
        config: of a model that lies in one file, which says nothing else of generating.
    """
    of = _transformers().GenerationConfig
    if config is not None:
        return of.from_model_config(config)
    try:
        return of.from_pretrained(source)
    except OSError:
        return of.from_pretrained(source, config_file_name="config.json", _from_model_config=True)


def _refuse_other_tensors(name: str, info: Mapping[str, Any], with_head: bool) -> None:
    """Refuse what transformers only logs: weights that would be random, and tensors that nobody reads.

    Args:
        name: of the model.
        info: what transformers says of the tensors.
        with_head: whether the files are of a model with a head, which is not loaded.
    """
    found = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
        "unknown": [] if with_head else sorted(info["unexpected_keys"]),
        "unreadable": list(info.get("error_msgs") or ()),
    }
    if any(found.values()):
        parts = [f"{what} {keys[:4]} ({len(keys)} in all)" for what, keys in found.items() if keys]
        raise ModelNotFound(
            f"{name} does not hold the tensors of its model: {', '.join(parts)}. "
            "Fix: copy or download the files again, or correct config.json"
        )


def _tokenizer(source: str, **gguf: str) -> Any:
    with _silent(), _as_not_found(f"the tokenizer of {source}"):
        return _transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)


@contextlib.contextmanager
def _as_not_found(name: str) -> Iterator[None]:
    """Whatever reading damaged or foreign files runs into, as one line."""
    try:
        yield
    except ModelNotFound:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0] if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {lines[0]}"
        raise ModelNotFound(
            f"{name} could not be loaded: {reason:.300}. Fix: give a local folder, a .gguf file or, online, a hub id"
        ) from error


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModelNotFound("loading models needs transformers. Fix: pip install 'torch-qcompile[hf]'") from error
    return transformers


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Hide the progress bars and warnings of transformers while it reads, and of torchao, which it imports."""
    transformers, pytree = _transformers(), logging.getLogger("torch.utils._pytree")
    level, before = transformers.logging.get_verbosity(), pytree.level
    transformers.logging.set_verbosity_error()
    pytree.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(level)
        pytree.setLevel(before)
