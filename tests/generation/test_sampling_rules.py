"""Rules of sampling: values out of range are refused, and transformers gets each of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.generation.sampling_rules import SamplingRules


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": math.nan}, "temperature=nan: it is 0 .greedy. or a finite value above"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"seed": -1}, "seed=-1: it is 0 or more"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0: it is 1 to"),
        ({"temperature": 1.0, "top_k": 10**9}, "top_k=1000000000"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p=0.0: it is a share above 0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p=1.1"),
        ({"temperature": 1.0, "min_p": math.nan}, "min_p=nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: it is a finite value above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf"),
        ({"top_k": 5}, "top_k is of sampling, and temperature=0 is greedy. Fix: give a temperature"),
        ({"min_p": 0.5}, "min_p is of sampling"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SamplingRules(**options)


def test_generate_gets_every_value_and_no_default_of_a_checkpoint():
    config = SamplingRules(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2).generation_config(
        8, {7, 3}
    )
    assert (config.max_new_tokens, config.eos_token_id, config.pad_token_id, config.do_sample) == (8, [3, 7], 3, True)
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.7, 5, 0.9, 0.1)
    assert config.repetition_penalty == 1.2
    plain = SamplingRules(temperature=1.0).generation_config(8, set())
    assert (plain.top_k, plain.top_p, plain.min_p, plain.repetition_penalty) == (0, 1.0, 0.0, 1.0)
    assert plain.eos_token_id is None and plain.pad_token_id == 0
    assert not SamplingRules().generation_config(8, set()).do_sample


def test_greedy_rules_process_nothing():
    assert SamplingRules(seed=5).processors() == [] and len(SamplingRules(repetition_penalty=2.0).processors()) == 1
    names = [type(p).__name__ for p in SamplingRules(temperature=1.0, top_k=2, top_p=0.5, min_p=0.5).processors()]
    assert names == ["TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper"]


@given(
    st.lists(st.floats(-9, 9, width=32), min_size=4, max_size=9, unique=True),
    st.integers(1, 4),
    st.integers(0, 2**70),
)
def test_tokens_are_drawn_from_the_most_likely_ones(logits, top_k, seed):
    rules, scores = SamplingRules(temperature=2.0, top_k=top_k, seed=seed), torch.tensor([logits])
    processors, generator = rules.processors(), rules.generator()
    drawn = [rules.draw(torch.tensor([[0]]), scores, processors, generator) for _ in range(6)]
    assert set(drawn) <= set(scores[0].topk(top_k).indices.tolist())
    again = rules.generator()
    assert drawn == [rules.draw(torch.tensor([[0]]), scores, processors, again) for _ in range(6)]
    greedy = SamplingRules()
    assert greedy.draw(torch.tensor([[0]]), scores, [], greedy.generator()) == int(scores.argmax())


def test_a_temperature_is_the_width_of_the_distribution():
    """Shares of many draws; three standard deviations of them."""
    scores, count = torch.tensor([[0.0, math.log(4.0)]]), 4000
    for temperature, expected in ((1.0, 0.8), (2.0, 2 / 3)):
        rules = SamplingRules(temperature=temperature, seed=1)
        processors, generator = rules.processors(), rules.generator()
        share = sum(rules.draw(torch.tensor([[0]]), scores, processors, generator) for _ in range(count)) / count
        assert abs(share - expected) < 3 * math.sqrt(expected * (1 - expected) / count)
