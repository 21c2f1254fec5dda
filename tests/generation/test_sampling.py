"""Conversations: what is read again and what is not, and text that arrives in readable pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from zoo import build

from qcompile.generation.sampling import (
    Conversation,
    end_tokens,
    new_tokens,
    print_answer,
    readable_text,
    step_function,
    stream,
)
from qcompile.generation.sampling_rules import SamplingRules


class Letters:
    """A tokenizer of characters: token = code point, 2 ends a text."""

    chat_template, eos_token_id = "yes", 2

    def apply_chat_template(self, turns, add_generation_prompt, tokenize):
        return "".join(f"{t['role'][0]}:{t['content']};" for t in turns) + "a:"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(t) for t in tokens if t > 2)


def counting(model, read):
    step = step_function(model)

    def counted(ids, cache):
        read.append(ids.shape[1])
        return step(ids, cache)

    return counted


@pytest.fixture(scope="module")
def model():
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():  # or it repeats the last token for ever
            if parameter.ndim == 2 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(6)
    return model


def test_a_stream_is_what_generate_gives(model):
    ids = torch.tensor([[5, 9, 17, 33]])
    want = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:].tolist()
    assert list(stream(step_function(model), ids.numpy(), 8)) == want
    assert list(stream(step_function(model), ids.numpy(), 8, stop={want[3]})) == want[: want.index(want[3]) + 1]
    sampled = [
        list(stream(step_function(model), ids.numpy(), 8, rules=SamplingRules(temperature=5.0, seed=s)))
        for s in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_second_turn_reads_only_what_is_new(model):
    read = []
    talk = Conversation(counting(model, read), Letters(), max_new_tokens=4)
    first = "".join(talk.answer("hi"))
    assert read == [len("u:hi;a:"), 1, 1, 1] and talk.turns[-1] == {"role": "assistant", "content": first}
    assert len(first) == 4 and "u:hi;a:" + first[:3] == "".join(map(chr, talk.cached_tokens))  # every token is a letter
    del read[:]
    second = "".join(talk.answer("so"))
    assert read == [len(first[-1:] + ";u:so;a:"), 1, 1, 1]
    whole = np.array([[ord(c) for c in f"u:hi;a:{first};u:so;a:"]])
    assert "".join(readable_text(Letters(), stream(step_function(model), whole, 4))) == second


def test_a_turn_that_the_template_writes_otherwise_is_read_again(model):
    class Forgetful(Letters):
        def apply_chat_template(self, turns, add_generation_prompt, tokenize):
            return f"u:{turns[-1]['content']};a:"

    read = []
    talk = Conversation(counting(model, read), Forgetful(), max_new_tokens=2)
    list(talk.answer("hi"))
    second = "".join(talk.answer("yes"))
    assert read == [7, 1, 8, 1]
    fresh = "".join(Conversation(step_function(model), Forgetful(), max_new_tokens=2).answer("yes"))
    assert second == fresh


def test_characters_that_span_tokens_wait():
    class Bytes:
        def decode(self, tokens, skip_special_tokens):
            return bytes(tokens).decode("utf-8", errors="replace")

    assert list(readable_text(Bytes(), "aé!".encode())) == ["a", "é", "!"]


def test_a_text_ends_at_any_token_that_the_model_names(model):
    other = build("llama")
    other.generation_config.eos_token_id = [7, 9]
    assert end_tokens(Letters(), other) == {2, 7, 9}
    other.generation_config.eos_token_id = 5
    assert end_tokens(Letters(), other) == {2, 5} and end_tokens(Letters()) == {2}
    whole = np.array([[ord(c) for c in "u:hi;a:"]])
    tokens = list(stream(step_function(model), whole, 4))
    talk = Conversation(step_function(model), Letters(), max_new_tokens=4, stop={tokens[1]})
    assert "".join(talk.answer("hi")) == "".join(map(chr, tokens[: tokens.index(tokens[1]) + 1]))


def test_a_model_without_a_template(model):
    class Plain:
        chat_template = None

    with pytest.raises(ValueError, match="no chat template"):
        Conversation(step_function(model), Plain())


@pytest.mark.parametrize("kept", [1, 2, 3])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "only dropped"])
def test_an_answer_that_is_not_read_to_its_end_is_what_was_read(model, kept, closed):
    """The next answer is that of a fresh model which reads the same conversation."""
    talk = Conversation(step_function(model), Letters(), max_new_tokens=4)
    answer = talk.answer("hi")
    read = "".join(next(answer) for _ in range(kept))
    if closed:
        answer.close()
    assert talk.cache.get_seq_length() == len(talk.cached_tokens)
    second = "".join(talk.answer("so"))
    assert [t["content"] for t in talk.turns] == ["hi", read, "so", second]
    assert list(answer) == [] and talk.cache.get_seq_length() == len(talk.cached_tokens), "it ended there"
    whole = np.array([[ord(c) for c in f"u:hi;a:{read};u:so;a:"]])
    assert second == "".join(readable_text(Letters(), stream(step_function(model), whole, 4)))


def test_a_turn_whose_answer_fails_is_forgotten(model):
    step, fails = step_function(model), []

    def failing(ids, cache):
        done = step(ids, cache)
        if fails and fails.pop():
            raise OSError("the network is gone")
        return done

    talk = Conversation(failing, Letters(), max_new_tokens=3)
    first = "".join(talk.answer("hi"))
    fails += [True, False]
    with pytest.raises(OSError, match="network"):
        list(talk.answer("lost"))
    assert [t["content"] for t in talk.turns] == ["hi", first] and talk.cache is None and not talk.cached_tokens
    whole = np.array([[ord(c) for c in f"u:hi;a:{first};u:so;a:"]])
    assert "".join(talk.answer("so")) == "".join(readable_text(Letters(), stream(step, whole, 3)))


def test_an_answer_ends_where_the_context_does(model):
    talk = Conversation(step_function(model), Letters(), max_new_tokens=8, max_length=len("u:hi;a:") + 3)
    assert len("".join(talk.answer("hi"))) == 3
    with pytest.raises(ValueError, match="a text of 18 tokens: the context of the model ends at 10"):
        list(talk.answer("so"))
    assert len(talk.turns) == 2
    assert new_tokens(5, 8, None) == 8


def test_a_stream_of_no_prompt_is_refused(model):
    with pytest.raises(ValueError, match="prompt is empty. Fix: give at least one token"):
        list(stream(step_function(model), np.zeros((1, 0), np.int64), 2))


class Printed(Letters):
    """As `generate()` and its streamer call a tokenizer."""

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(t) for t in tokens if t > 2)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"temperature": 4.0}, {"temperature": 9.0, "top_k": 5, "seed": 3}, {"temperature": 9.0, "top_p": 0.4},
        {"temperature": 9.0, "min_p": 0.3, "seed": 10**30}, {"repetition_penalty": 3.0},
        {"temperature": 3.0, "repetition_penalty": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
    ],
)  # fmt: skip
def test_generate_prints_what_a_stream_draws(model, capsys, options):
    """The same tokens, also where they are drawn; and neither changes what others draw."""
    rules, ids = SamplingRules(**options), np.array([[70, 90, 66, 80]])
    before = torch.get_rng_state()
    print_answer(model, Printed(), ids, 12, rules, {2})
    assert torch.equal(torch.get_rng_state(), before)
    drawn = list(stream(step_function(model), ids, 12, rules=rules, stop={2}))
    assert capsys.readouterr().out == "".join(chr(t) for t in drawn if t > 2) + "\n"
    if options:
        greedy = list(stream(step_function(model), ids, 12, stop={2}))
        assert drawn != greedy, "the rules change something"


def test_generate_ends_at_a_token_that_ends_a_text(model, capsys):
    ids = np.array([[70, 90, 66, 80]])
    tokens = list(stream(step_function(model), ids, 8))
    print_answer(model, Printed(), ids, 8, SamplingRules(), {tokens[2]})
    assert capsys.readouterr().out.strip("\n") == "".join(map(chr, tokens[: tokens.index(tokens[2]) + 1]))


def test_tokens_of_the_cache_count_as_used(model):
    """A penalty is on all tokens of a conversation, read in this turn or before."""
    rules, step, forgotten = SamplingRules(repetition_penalty=50.0), step_function(model), 0
    for seed in range(12):
        ids = np.random.default_rng(seed).integers(0, 128, (1, 24))

        def behind(before, ids=ids):
            _, cache = step(ids[:, :23], None)
            return list(stream(step, ids[:, 23:], 6, cache=cache, before=before, rules=rules))

        whole = list(stream(step, ids, 6, rules=rules))
        assert behind(ids[0, :23].tolist()) == whole
        forgotten += behind([]) != whole
    assert forgotten, "or nothing here would tell"
