"""Words that this project does not use, as data: a pattern, and what to say instead.

`faults(text, path)` finds them. Tests of docs and of the house share this list. A pattern is matched without regard to
case, as whole words; an underscore separates words, so identifiers are covered too.

    RETIRED       private words, in prose and in identifiers
    BRITISH       spellings: the project writes US English
    IDENTIFIERS   names that are fine as English words and say nothing as the name of a variable
    ALLOWED       files in which a word has its plain meaning
"""

from __future__ import annotations

import fnmatch
import re

RETIRED: dict[str, str] = {
    "mend(s|ed|ing)?": "fix",
    "turn(s|ed|ing)?": "transpose, rotate, negate, become, convert",
    "ways": "variants, kernels, choices",
    "parted|part again": "unpacked, split",
    "(?<!-)coded": "int8 (KV cache), quantized",
    "spell(s|ed|ing)?[ _]out": "decomposed",
    "laid[ _]out": "flattened, reshaped",
    "strangers?": "other consumers",
    "makers?": "producers",
    "twins?": "randomly rotated copy",
    "the builder": "onnxruntime-genai's model builder (GenAI model builder)",
    "numbers": "values, dequantized values, figures, counts, indices",
    "contenders?": "baselines",
    "left (float|as it (is|was)|as they (are|were)|out|alone)": "kept float, skipped, omitted",
    "leav(e|es|ing) (a|the|this|that|every|each) sites?": "skip",
    "one step for (all|each|every)": "a per-tensor scale, a per-token scale",
    "steps? for (all|each|every) tokens?": "a per-tensor scale, a per-token scale",
    "site[ _]weights": "weights of quantized linears, quantized weights",
    "portable": "standard ONNX operators (contrib_ops=False)",
    "slower=\\S*|[\"'`]slower[\"'`]": "on_slow_kernel",
    "(few|many) rows": "decode, prefill; small M, large M",
    "the machine's own": "measured on this machine",
    "pivots?": "massive-activation token",
}

BRITISH: dict[str, str] = {
    r"\w*(normal|recogn|initial|minim|maxim|special|optim|quant|serial|general|organ|summar|util|factor|parallel|token|"
    r"vector|linear|symbol|random|real|local|categor|character|custom|emphas|final|prior|synchron|visual|discret|"
    r"neutral|stabil|harmon|regular)is(e|es|ed|er|ers|ing|ation|ations)": "-ize, -ization",
    "centr(e|es|ed|ing)": "center",
    "behaviour(s|al)?": "behavior",
    "colour(s|ed|ing)?": "color",
    "neighbour(s|ing|hood)?": "neighbor",
    "(un)?favour(s|ed|able|ite)?": "favor",
    "(re)?analys(e|ed|er|ing)": "analyze",
    "catalogue[sd]?": "catalog",
    "grey(s|ed)?": "gray",
    "artefacts?": "artifact",
    "licenc(e|es|ed)": "license",
    "(label|model|cancel|travel|channel)l(ed|ing)": "one l",
    "fulfils?": "fulfill",
    "metres?": "meter",
}

IDENTIFIERS: dict[str, str] = {
    "held": "kept, or what the thing is",
    "seen": "statistics, visited",
    "wanted": "planned",
    "asked": "requested",
    "how": "config, options, launch",
    "way": "variant, kernel",
}

ALLOWED: dict[str, tuple[str, ...]] = {  # pattern -> files, relative to the root
    "centr(e|es|ed|ing)": ("qcompile/recipe/schema.py",),  # the name of a field in schema 1
    "turn(s|ed|ing)?": (  # of a conversation
        "qcompile/generation/sampling.py",
        "qcompile/cli/generate.py",
        "tests/generation/test_sampling.py",
        "tests/cli/test_generate.py",
    ),
}


def faults(text: str, path: str = "") -> list[str]:
    """Every retired word and British spelling of a text, as "path:line: word (say: ..)".

    Args:
        text: prose or source.
        path: where it is from, relative to the root; decides which words are allowed.
    """
    found = []
    for pattern, instead in {**RETIRED, **BRITISH}.items():
        if any(fnmatch.fnmatch(path, allowed) for allowed in ALLOWED.get(pattern, ())):
            continue
        for match in re.finditer(rf"(?<![^\W_])(?:{pattern})(?![^\W_])", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path}:{line}: {match[0]!r} (say: {instead})")
    return found
