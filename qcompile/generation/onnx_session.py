"""Run an exported folder in ONNX Runtime: logits of a window, tokens one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from qcompile.codegen.onnx.genai_config import FILE
from qcompile.generation.sampling import stream
from qcompile.generation.sampling_rules import SamplingRules
from qcompile.memory.process import release_freed_memory

PREFIX_FILE = "prefix.safetensors"  # ids, logits, keys and values of a prefix (passes/kv_cache/intact_kv.py)

# A prompt is read in chunks: ONNX Runtime's attention computes and keeps every score of a chunk, masked or not.
PREFILL_CHUNK = 256


class FolderError(ValueError):
    """Not an exported folder, or an unsuitable one; the text names what is missing and the fix."""


class Session:
    """An exported causal LM with its cache.

    Attributes:
        session: the InferenceSession.
        past_inputs: its inputs of cached keys and values, layer by layer.
        cache_shapes: (heads, head size) of each past input.
        cache_dtype: float32, or int8 of a quantized cache.
        max_length: tokens that the folder's rotary tables reach; None if it does not say.
        end_tokens: the tokens that end a text.
        prefix: ids, logits, keys and values of a float prefix; None without one.
        vocabulary: ids that the model knows; 1 where the file does not say.
    """

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        """Open a folder.

        Args:
            folder: what export_onnx wrote, or a folder of the same layout.
            threads: of ONNX Runtime; 0 takes as many as torch.

        Raises:
            FolderError: no model.onnx, one that is damaged, or a model without a cache; or ONNX Runtime is missing.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise FolderError(f"{error}. Fix: pip install 'torch-qcompile[onnx]'") from error

        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise FolderError(f"{folder} holds no model.onnx. Fix: write it with qcompile export-onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a dozen classes of its own, all below Exception
            first = str(error).strip().splitlines()[0]
            raise FolderError(f"{path} cannot be opened: {first}. Fix: export it again") from error
        release_freed_memory()  # opening packs int8 weights, which takes several times their size for a moment
        self.past_inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        if not self.past_inputs:
            raise FolderError(f"{path} takes no cache. Fix: name the folder of a causal LM")

        config = _model_config(Path(folder) / FILE)
        self.max_length: int | None = config.get("context_length")
        self.cache_dtype = np.int8 if self.past_inputs[0].type == "tensor(int8)" else np.float32
        head_size = config.get("decoder", {}).get("head_size")  # dynamic in the graphs of other exporters
        self.cache_shapes = [
            (i.shape[1], i.shape[3] if isinstance(i.shape[3], int) else head_size) for i in self.past_inputs
        ]
        ends = config.get("eos_token_id") or []
        self.end_tokens: set[int] = set(ends) if isinstance(ends, list) else {ends}
        self.prefix: dict[str, np.ndarray] | None = None
        if (Path(folder) / PREFIX_FILE).is_file():
            try:
                self.prefix = load_file(str(Path(folder) / PREFIX_FILE))
            except (SafetensorError, OSError, ValueError) as error:
                raise FolderError(f"{Path(folder) / PREFIX_FILE} is damaged: {error}. Fix: export it again") from error
        width = self.session.get_outputs()[0].shape[-1] if hasattr(self.session, "get_outputs") else None
        self.vocabulary = width if isinstance(width, int) else 1

    def step(self, ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run the model once.

        Args:
            ids: [B, S] int64.
            cache: keys and values of the tokens before, [B, H, T, D] each; None for none.

        Returns:
            Logits [B, S, V] and the cache of [B, H, T + S, D].

        Raises:
            FolderError: the tokens outreach the rotary tables.
        """
        behind = self._behind_prefix(ids) if cache is None else None
        if behind is not None:
            rest, cache, first = behind
            logits, grown = self.step(rest, cache)
            return np.concatenate([first, logits], 1), grown
        batch = ids.shape[0]
        if cache is None:
            cache = [np.zeros((batch, heads, 0, size), self.cache_dtype) for heads, size in self.cache_shapes]
        if batch > 1 and ids.shape[1] > 1 and cache[0].shape[2]:  # more than GroupQueryAttention does at once
            rows = [self.step(ids[i : i + 1], [part[i : i + 1] for part in cache]) for i in range(batch)]
            grown = [np.concatenate(parts) for parts in zip(*(caches for _, caches in rows), strict=True)]
            return np.concatenate([logits for logits, _ in rows]), grown
        total = cache[0].shape[2] + ids.shape[1]
        if self.max_length is not None and total > self.max_length:
            raise FolderError(
                f"a text of {total} tokens: the rotary tables of this folder end at {self.max_length}. Fix: shorten it"
            )
        mask = np.ones((batch, total), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        feeds |= {i.name: value for i, value in zip(self.past_inputs, cache, strict=True)}
        logits, *grown = self.session.run(None, feeds)
        return logits, grown

    def read(self, ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """As `step`, a long prompt in chunks; the logits are those of the last chunk."""
        chunk = PREFILL_CHUNK if self.prefix is None else max(PREFILL_CHUNK, len(self.prefix["ids"]) + 1)
        logits, cache = self.step(ids[:, :chunk], cache)
        for start in range(chunk, ids.shape[1], chunk):
            logits, cache = self.step(ids[:, start : start + chunk], cache)
        return logits, cache

    def __call__(self, *, input_ids: Tensor) -> Tensor:
        """Logits [B, S, V] of a window; what evaluation/perplexity.py calls.

        With an int8 cache it is read chunk by chunk: within one chunk attention sees float keys and values.

        Raises:
            FolderError: the folder gives the last token's logits only.
        """
        ids, cache = input_ids.numpy(), None
        logits_of_chunks = []
        chunk = PREFILL_CHUNK if self.cache_dtype is np.int8 and len(ids) == 1 else ids.shape[1]
        for start in range(0, ids.shape[1], chunk):
            logits, cache = self.step(ids[:, start : start + chunk], cache)
            logits_of_chunks.append(logits)
        whole = np.concatenate(logits_of_chunks, 1)
        if whole.shape[1] != input_ids.shape[1]:
            raise FolderError("this folder gives the last token's logits only. Fix: export it without last_logits")
        return torch.from_numpy(whole)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        *,
        rules: SamplingRules | None = None,
        stop: set[int] | None = None,
    ) -> Iterator[int]:
        """New tokens after ids [1, S], one by one; see sampling.stream."""
        yield from stream(self.read, ids.numpy(), max_new_tokens, rules=rules, stop=stop)

    def _behind_prefix(self, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray] | None:
        """For ids that begin with the prefix: the ids behind it, the prefix's cache and its logits. Else None."""
        if self.prefix is None:
            return None
        start = self.prefix["ids"]
        if ids.shape[1] <= len(start) or not (ids[:, : len(start)] == start).all():
            return None
        layers = range(len(self.past_inputs) // 2)
        caches = [self.prefix[f"{part}{layer}"] for layer in layers for part in ("keys", "values")]
        *caches, logits = (np.repeat(value, len(ids), 0) for value in (*caches, self.prefix["logits"]))
        return ids[:, len(start) :], caches, logits


def _model_config(path: Path) -> dict[str, Any]:
    """The part of GenAI's config that is about the model; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["model"]
        whole = isinstance(config, dict) and isinstance(config.get("decoder", {}), dict)
    except (ValueError, TypeError, KeyError, RecursionError):
        whole = False
    if not whole:
        raise FolderError(f"{path} is damaged. Fix: export the folder again")
    return cast(dict[str, Any], config)


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of an exported folder, as transformers reads it.

    Raises:
        FolderError: the folder holds none.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise FolderError(f"{error}. Fix: pip install 'torch-qcompile[hf]'") from error

    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise FolderError(
            f"{folder} holds no tokenizer. Fix: give export_onnx one (tokenizer=..), or copy its files there"
        )
    return AutoTokenizer.from_pretrained(str(folder))
