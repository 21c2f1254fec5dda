"""An exported folder in lm-eval scores texts as the model that was exported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_text_models import one_layer_llama
from word_tokenizer import word_tokenizer

import qcompile
from qcompile.evaluation.lm_eval_tasks import evaluate_tasks
from qcompile.generation.onnx_session import Session

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests/data/lm_eval"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"),
]
PROMPT = "The sun rises in the"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its tokenizer and its folder."""
    folder, tokenizer = tmp_path_factory.mktemp("onnx") / "m", word_tokenizer(TASKS)
    model = one_layer_llama(len(tokenizer))
    qcompile.export_onnx(model, folder, tokenizer=tokenizer, progress=False)
    return model, tokenizer, folder


@pytest.fixture
def judged(exported):
    from qcompile.evaluation.onnx_lm import OnnxLM

    _, tokenizer, folder = exported
    return OnnxLM(Session(folder), tokenizer, 2048)


def test_tasks_score_alike_on_both_roads(exported, monkeypatch):
    model, tokenizer, folder = exported
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    names = ["capitals", "last_word", "pages"]
    found = [
        evaluate_tasks(each, tokenizer, names, include_path=TASKS, limit=4, max_length=64)
        for each in (Session(folder), model)
    ]
    values = [{(s.task, s.metric): s.value for s in result.scores} for result in found]
    assert len(values[0]) == 6 and values[0] == pytest.approx(values[1], rel=1e-3)


def test_the_rest_of_a_text_that_is_too_long_is_scored(exported, judged):
    model, tokenizer, _ = exported
    assert judged.max_length == 64
    judged.max_length = 4
    ids = tokenizer.encode("The dog chased the cat up the tree")
    with torch.no_grad():
        last = model(torch.tensor([ids[-5:-1]])).logits[0, -2:].log_softmax(-1)
    expected = float(last[0, ids[-2]] + last[1, ids[-1]])
    ((total, greedy),) = judged._loglikelihood_tokens([(None, ids[:-2], ids[-2:])])
    assert total == pytest.approx(expected, rel=1e-3) and isinstance(greedy, bool)


def test_rolling_windows_add_up(exported, judged):
    model, tokenizer, _ = exported
    text = "We read books in a library"
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
    with torch.no_grad():
        scores = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    expected = float(scores.gather(1, torch.tensor(ids[1:])[:, None]).sum())
    assert judged.loglikelihood_rolling([SimpleNamespace(args=(text,))]) == [pytest.approx(expected, rel=1e-3)]
    judged.max_length = 3
    (cut,) = judged.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    assert cut != pytest.approx(expected, rel=1e-3) and cut < 0


def test_texts_end_at_a_stop(exported, judged):
    model, tokenizer, _ = exported
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    words = expected.split(" ")
    request = SimpleNamespace(args=(PROMPT, {"until": [], "max_gen_toks": 6}))
    assert judged.generate_until([request]) == [expected] and len(words) > 2
    stop = next((w for w in words[1:] if w != words[0]), words[0])
    request = SimpleNamespace(args=(PROMPT, {"until": stop, "max_gen_toks": 6}))
    assert judged.generate_until([request]) == [expected[: expected.index(stop)]]
    sampled = SimpleNamespace(args=(PROMPT, {"do_sample": True, "temperature": 2.0, "max_gen_toks": 4}))
    assert len(judged.generate_until([sampled, sampled])) == 2


def test_tokens_of_ends_and_names(exported, judged):
    _, tokenizer, _ = exported
    assert (judged.prefix_token_id, judged.eot_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokenizer_of_test = judged.tokenizer
    assert judged.tok_encode("The cat") == tokenizer_of_test.encode("The cat", add_special_tokens=False)
    assert "/" not in judged.tokenizer_name
