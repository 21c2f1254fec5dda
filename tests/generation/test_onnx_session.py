"""A session's own logic, over a model that is a few lines: chunks, batches, prefixes, limits."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import save_file
from zoo import build, example

import qcompile
from qcompile.codegen.onnx.genai_config import FILE
from qcompile.generation import onnx_session
from qcompile.generation.onnx_session import PREFIX_FILE, FolderError, Session, load_tokenizer
from qcompile.generation.sampling import stream

VOCABULARY = 50


class SumOfTokens:
    """Logits are one-hot at the sum of all tokens so far; the cache [B, 1, T, 1] is the tokens."""

    dtype = "tensor(float)"

    def __init__(self, *args, **kwargs):
        self.lengths = []

    def get_inputs(self):
        cached = [SimpleNamespace(name=f"past_key_values.0.{part}", type=self.dtype, shape=["b", 1, "t", 1])
                  for part in ("key", "value")]  # fmt: skip
        return [SimpleNamespace(name="input_ids"), SimpleNamespace(name="attention_mask"), *cached]

    def run(self, names, feeds):
        ids, past = feeds["input_ids"], feeds["past_key_values.0.key"]
        self.lengths.append(ids.shape)
        assert feeds["attention_mask"].shape == (len(ids), past.shape[2] + ids.shape[1])
        assert len(ids) == 1 or ids.shape[1] == 1 or not past.shape[2], "GroupQueryAttention does not do this at once"
        grown = np.concatenate([past, ids[:, None, :, None].astype(past.dtype)], 2)
        sums = grown[:, 0, :, 0].astype(np.int64).cumsum(1)[:, past.shape[2] :] % VOCABULARY
        return [np.eye(VOCABULARY, dtype=np.float32)[sums], grown, grown]


class WithInt8Cache(SumOfTokens):
    dtype = "tensor(int8)"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", SumOfTokens)
    monkeypatch.setattr(onnx_session, "PREFILL_CHUNK", 4)
    (tmp_path / "model.onnx").touch()
    return tmp_path


def sums(ids):
    return np.eye(VOCABULARY, dtype=np.float32)[ids.cumsum(1) % VOCABULARY]


def test_a_long_prompt_is_read_in_chunks(folder):
    session, ids = Session(folder), np.arange(1, 12)[None]
    logits, cache = session.read(ids, None)
    assert session.session.lengths == [(1, 4), (1, 4), (1, 3)]
    assert (logits == sums(ids)[:, -3:]).all() and cache[0].shape == (1, 1, 11, 1)


def test_rows_of_a_batch_behind_a_cache_run_one_by_one(folder):
    session, ids = Session(folder), np.arange(1, 13).reshape(2, 6)
    _, cache = session.step(ids[:, :2], None)
    logits, grown = session.step(ids[:, 2:], cache)
    assert session.session.lengths == [(2, 2), (1, 4), (1, 4)]
    assert (logits == sums(ids)[:, 2:]).all() and (grown[0][:, 0, :, 0] == ids).all()


def test_windows_are_cut_for_an_int8_cache_only(folder, monkeypatch):
    ids = torch.arange(1, 7)[None]
    session = Session(folder)
    assert torch.equal(session(input_ids=ids), torch.from_numpy(sums(ids.numpy()))) and session.session.lengths == [
        (1, 6)
    ]
    monkeypatch.setattr(onnxruntime, "InferenceSession", WithInt8Cache)
    session = Session(folder)
    assert torch.equal(session(input_ids=ids), torch.from_numpy(sums(ids.numpy())))
    assert session.session.lengths == [(1, 4), (1, 2)] and session.cache_dtype is np.int8


def test_a_text_that_begins_with_the_prefix_starts_behind_it(folder):
    start = np.array([7, 8, 9])
    cache = start.astype(np.float32)[None, None, :, None]
    tensors = dict(ids=start, logits=sums(start[None]), keys0=cache, values0=cache)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, str(folder / PREFIX_FILE))
    session, ids = Session(folder), np.array([[7, 8, 9, 1, 2], [7, 8, 9, 3, 4]])
    logits, grown = session.step(ids, None)
    assert session.session.lengths[-1] == (1, 2) and (logits == sums(ids)).all() and grown[0].shape[2] == 5
    other = np.array([[7, 8, 1, 1, 2]])
    assert (session.step(other, None)[0] == sums(other)).all() and session.session.lengths[-1] == (1, 5)


def test_limits_and_ends_are_those_of_the_folder(folder):
    config = {"model": {"context_length": 6, "eos_token_id": [3, 5], "decoder": {"head_size": 1}}}
    (folder / FILE).write_text(json.dumps(config))
    session = Session(folder)
    assert session.end_tokens == {3, 5} and session.max_length == 6
    _, cache = session.step(np.ones((1, 4), np.int64), None)
    with pytest.raises(FolderError, match="a text of 7 tokens: .* end at 6. Fix: shorten it"):
        session.step(np.ones((1, 3), np.int64), cache)
    assert list(session.stream(torch.tensor([[1]]), 3, stop=session.end_tokens)) == [1, 2, 4]


def test_other_folders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FolderError, match="no model.onnx. Fix: write it"):
        Session(tmp_path)
    with pytest.raises(FolderError, match="no tokenizer. Fix: give export_onnx one"):
        load_tokenizer(tmp_path)
    (tmp_path / "model.onnx").touch()
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: SimpleNamespace(get_inputs=lambda: []))
    with pytest.raises(FolderError, match="takes no cache. Fix: name the folder of a causal LM"):
        Session(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"model": 1}', '{"model": {"decoder": 3}}', "[" * 9999, "\xff"])
def test_a_damaged_config_is_refused(text, folder):
    (folder / FILE).write_bytes(text.encode("latin1"))
    with pytest.raises(FolderError, match="is damaged. Fix: export the folder again"):
        Session(folder)


def test_damaged_files_are_refused_by_name(folder, monkeypatch):
    (folder / PREFIX_FILE).write_bytes(b"no tensors")
    with pytest.raises(FolderError, match=f"{PREFIX_FILE} is damaged"):
        Session(folder)
    monkeypatch.undo()
    with pytest.raises(FolderError, match="model.onnx cannot be opened: .*. Fix: export it again"):
        Session(folder)


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(FolderError, match=r"pip install 'torch-qcompile\[onnx\]'"):
        Session(folder)


@pytest.mark.slow
def test_chunks_of_a_file_are_the_whole(tmp_path, monkeypatch):
    """A W4A8 decoder: prefill in chunks, then decode of one token after another."""
    qcompile.export_onnx(build("llama"), tmp_path / "m", "int4-cpu", [example("llama")], progress=False)
    session, prompt = Session(tmp_path / "m"), np.random.default_rng(0).integers(3, 128, (1, 45))
    whole, cache = session.step(prompt, None)
    calls, step = [], session.step
    monkeypatch.setattr(onnx_session, "PREFILL_CHUNK", 20)
    monkeypatch.setattr(session, "step", lambda ids, cache: calls.append(ids.shape[1]) or step(ids, cache))
    logits, grown = session.read(prompt, None)
    assert calls == [20, 20, 5]
    assert logits.shape[1] == 5 and np.abs(logits[:, -1] - whole[:, -1]).max() < 0.02 * np.abs(whole).max()
    assert all(a.shape == b.shape for a, b in zip(cache, grown, strict=True))
    assert list(session.stream(torch.from_numpy(prompt), 4)) == list(stream(step, prompt, 4))
    assert calls.count(20) == 4
