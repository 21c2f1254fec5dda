"""Run an exported folder in ONNX Runtime: logits of a window, tokens one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from qcompile.codegen.onnx.genai_config import FILE
from qcompile.generation.sampling import stream
from qcompile.memory.process import release_freed_memory

PREFIX_FILE = "prefix.safetensors"  # ids, logits, keys and values of a prefix (passes/kv_cache/intact_kv.py)


# A prompt is read in pieces: ONNX Runtime's attention computes and holds every score of a piece, masked or not.
PIECE = 256


class FolderError(ValueError):
    """Not an exported folder; the text says what is missing."""


class Session:
    """An exported causal LM with its cache."""

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        """Open `folder`; `threads` 0 takes torch's number.

        Raises:
            FolderError: no model.onnx, or a model without a cache.

        `longest` is the number of tokens that the folder's tables reach, None if it does not say; `ends` the
        tokens that end a text.
        """
        import onnxruntime

        path = Path(folder) / "model.onnx"
        if not path.is_file():
            raise FolderError(f"{folder} holds no model.onnx: write it with qcompile export-onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        release_freed_memory()  # opening computes int8 weights, which takes several times their size for a moment
        self.past = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        if not self.past:
            raise FolderError(f"{path} takes no cache: it is not a causal LM")

        described = json.loads((Path(folder) / FILE).read_text())["model"] if (Path(folder) / FILE).is_file() else {}
        self.longest: int | None = described.get("context_length")
        size = described.get("decoder", {}).get("head_size")  # folders of other tools leave it free in the graph
        self.cached = np.int8 if self.past[0].type == "tensor(int8)" else np.float32
        self.shapes = [(i.shape[1], i.shape[3] if isinstance(i.shape[3], int) else size) for i in self.past]
        ends = described.get("eos_token_id") or []
        self.ends: set[int] = set(ends) if isinstance(ends, list) else {ends}
        self.prefix: dict[str, np.ndarray] | None = None
        if (Path(folder) / PREFIX_FILE).is_file():
            self.prefix = load_file(str(Path(folder) / PREFIX_FILE))

    def _behind_prefix(self, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], np.ndarray] | None:
        """What is left of ids that begin with the prefix, its caches, and its logits; None for others."""
        if self.prefix is None:
            return None
        start = self.prefix["ids"]
        if ids.shape[1] <= len(start) or not (ids[:, : len(start)] == start).all():
            return None
        caches = [self.prefix[f"{part}{i}"] for i in range(len(self.past) // 2) for part in ("keys", "values")]
        rows = [np.repeat(value, len(ids), 0) for value in (*caches, self.prefix["logits"])]
        return ids[:, len(start) :], rows[:-1], rows[-1]

    def step(self, ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """ids [B, T] after a cache -> logits [B, T, V] and the grown cache."""
        behind = self._behind_prefix(ids) if cache is None else None
        if behind is not None:
            rest, cache, first = behind
            logits, grown = self.step(rest, cache)
            return np.concatenate([first, logits], 1), grown
        batch = ids.shape[0]
        if cache is None:
            cache = [np.zeros((batch, groups, 0, size), self.cached) for groups, size in self.shapes]
        if batch > 1 and ids.shape[1] > 1 and cache[0].shape[2]:  # more than GroupQueryAttention does at once
            rows = [self.step(ids[i : i + 1], [part[i : i + 1] for part in cache]) for i in range(batch)]
            grown = [np.concatenate(parts) for parts in zip(*(caches for _, caches in rows), strict=True)]
            return np.concatenate([logits for logits, _ in rows]), grown
        total = cache[0].shape[2] + ids.shape[1]
        if self.longest is not None and total > self.longest:
            raise FolderError(f"a text of {total} tokens: the rotary tables of this folder end at {self.longest}")
        mask = np.ones((batch, total), np.int64)
        feeds = {"input_ids": ids, "attention_mask": mask}
        feeds |= {i.name: value for i, value in zip(self.past, cache, strict=True)}
        logits, *grown = self.session.run(None, feeds)
        return logits, grown

    def read(self, ids: np.ndarray, cache: list[np.ndarray] | None) -> tuple[np.ndarray, list[np.ndarray]]:
        """As step, a long text in pieces; the logits are those of the last piece."""
        piece = PIECE if self.prefix is None else max(PIECE, len(self.prefix["ids"]) + 1)
        logits, cache = self.step(ids[:, :piece], cache)
        for start in range(piece, ids.shape[1], piece):
            logits, cache = self.step(ids[:, start : start + piece], cache)
        return logits, cache

    def __call__(self, *, input_ids: Tensor) -> Tensor:
        """Logits [B, T, V] of a window; what evaluate.perplexity calls.

        With a cache of codes it is read piece by piece: within a piece of many tokens nothing is rounded.
        """
        ids, parts, cache = input_ids.numpy(), [], None
        piece = PIECE if self.cached is np.int8 and len(ids) == 1 else ids.shape[1]
        for start in range(0, ids.shape[1], piece):
            part, cache = self.step(ids[:, start : start + piece], cache)
            parts.append(part)
        logits = np.concatenate(parts, 1)
        if logits.shape[1] != input_ids.shape[1]:
            raise FolderError("this folder gives the last token's logits only: export it without last_logits")
        return torch.from_numpy(logits)

    def stream(
        self, ids: Tensor, new: int, *, temperature: float = 0.0, seed: int = 0, stop: set[int] | None = None
    ) -> Iterator[int]:
        """New tokens after ids [1, T], one by one; temperature 0 is greedy."""
        yield from stream(self.read, ids.numpy(), new, temperature=temperature, seed=seed, stop=stop)


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer of an exported folder.

    Raises:
        FolderError: it holds none.
    """
    from transformers import AutoTokenizer

    if not (Path(folder) / "tokenizer_config.json").is_file():
        raise FolderError(f"{folder} holds no tokenizer: give export_onnx one (tokenizer=..), or copy its files there")
    return AutoTokenizer.from_pretrained(str(folder))
