"""Recipes: what to do, as frozen data.

A `Recipe` is a tuple of pass configs in order and a tuple of `Rule`s, first match wins. It reads
from and writes to JSON with a schema number. This file knows no pass: they register themselves by
the type of their config (registry.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.numerics.format import Format
from qcompile.recipe.pass_config import ONLY_WHERE_SET, PassConfig
from qcompile.recipe.registry import kinds, registered
from qcompile.recipe.rule import RecipeError, Rule
from qcompile.recipe.schema import UnknownSchema, stamp, upgraded_recipe


@dataclass(frozen=True)
class Recipe:
    """What to do with a model.

    Attributes:
        name: what reports and checkpoints call it.
        passes: configs of passes, in the order in which they run.
        rules: what to do with sites by name; the first that matches decides.
        source: where the recipe comes from, for people.

    Raises:
        RecipeError: a config that belongs to no registered pass.
    """

    name: str
    passes: tuple[PassConfig, ...] = ()
    rules: tuple[Rule, ...] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        known = registered()
        for config in self.passes:
            if type(config) not in known:
                raise RecipeError(f"{config!r} is not a registered pass config; known: {_names(known)}")

    def with_rules(self, rules: Iterable[Rule]) -> Recipe:
        """The same recipe with more rules, which come first."""
        return dataclasses.replace(self, rules=(*rules, *self.rules))

    @property
    def needs(self) -> dict[str, tuple[str, ...]]:
        """Pass name -> the statistics it must be given; empty when the recipe is data-free."""
        entries = [(type(c).__name__, registered()[type(c)].needs(c)) for c in self.passes]
        return {name: needs for name, needs in entries if needs}

    @property
    def trains(self) -> bool:
        """Whether the recipe is one for `qcompile.train`."""
        return any(registered()[type(config)].trains for config in self.passes)

    def check(self) -> None:
        """Refuse conflicts between passes, all at once.

        Raises:
            RecipeError: the order or the combination is illegal.
        """
        faults: list[str] = []
        place: dict[type[PassConfig], int] = {}
        for index, config in enumerate(self.passes):
            for kind in kinds(config):
                if kind in place:
                    places = f"places {place[kind] + 1} and {index + 1}"
                    faults.append(f"{kind.__name__} stands twice ({places}): drop one")
                place[kind] = index
        for index, config in enumerate(self.passes):
            entry, name = registered()[type(config)], type(config).__name__
            for later in self.passes[index + 1 :]:
                if registered()[type(later)].stage < entry.stage:
                    faults.append(f"{name} must come after {type(later).__name__}: move it behind")
            for other in entry.requires(config):
                if other not in place:
                    faults.append(f"{name} needs {other.__name__} before it: add {other.__name__}()")
            faults += entry.conflicts(config, self.passes)
            if self.trains and not entry.trains:
                faults.append(f"{name} prepares for inference, in a recipe that trains: quantize after the training")
        if faults:
            raise RecipeError(f"recipe {self.name!r} cannot run:\n  " + "\n  ".join(faults))

    def resolve(self, names: Iterable[str], aliases: dict[str, list[str]] | None = None) -> dict[str, Rule | None]:
        """The first matching rule of every site.

        Args:
            names: of the sites.
            aliases: name -> other names of the same weight, which rules match too.

        Returns:
            name -> rule, or None where none matches.

        Raises:
            RecipeError: a rule that matches no site, with the three nearest names.
        """
        names = list(names)

        def hits(rule: Rule, name: str) -> bool:
            return rule.matches(name, *(aliases or {}).get(name, ()))

        idle = [r for r in self.rules if not any(hits(r, n) for n in names)]
        if idle:
            lines = []
            for rule in idle:
                plain = rule.match.strip("*")
                near = difflib.get_close_matches(plain, names, n=3, cutoff=0.0)
                lines.append(f"rule {rule.match!r} matches no site; nearest names: {', '.join(near)}")
            raise RecipeError("\n".join(lines))
        return {n: next((r for r in self.rules if hits(r, n)), None) for n in names}

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back."""
        return {
            **stamp(),
            "name": self.name,
            "passes": [{"pass": type(c).__name__, **_plain(c)} for c in self.passes],
            "rules": [_plain(r) for r in self.rules],
            "source": self.source,
        }

    @staticmethod
    def from_json(data: dict[str, Any], *, what: str = "") -> Recipe:
        """Read a recipe of schema 1 (with a warning that it was upgraded) or 2.

        Args:
            data: what `to_json` gives.
            what: what holds it, for messages; default: the recipe's name.

        Raises:
            RecipeError: unknown keys or passes, or an unknown schema, with the version that wrote it.
        """
        try:
            data = upgraded_recipe(data, what or f"recipe {data.get('name')!r}")
        except UnknownSchema as error:
            raise RecipeError(str(error)) from None
        extra = set(data) - {"schema", "qcompile", "name", "passes", "rules", "source"}
        if extra:
            raise RecipeError(f"unknown recipe keys {sorted(extra)}; known: schema, name, passes, rules, source")
        by_name = {config.__name__: config for config in registered()}
        passes = []
        for entry in data.get("passes", []):
            fields = dict(entry)
            name = fields.pop("pass", None)
            if name not in by_name:
                raise RecipeError(f"unknown pass {name!r}; known: {', '.join(sorted(by_name))}")
            passes.append(_build(by_name[name], fields))
        rules = tuple(_build(Rule, r) for r in data.get("rules", []))
        return Recipe(data["name"], tuple(passes), rules, data.get("source", ""))

    @staticmethod
    def read(path: str | Path) -> Recipe:
        """Read a JSON file.

        Raises:
            RecipeError: it is no recipe; see `from_json`.
        """
        try:
            return Recipe.from_json(json.loads(Path(path).read_text()), what=str(path))
        except json.JSONDecodeError as error:
            raise RecipeError(f"{path} is not a recipe: {error}. Fix: write one with Recipe.to_json()") from error


def _plain(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata == ONLY_WHERE_SET and value == item.default:
            continue
        out[item.name] = str(value) if isinstance(value, Format) else value
    return out


def _build(kind: type, fields: dict[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = set(fields) - known
    if unknown:
        raise RecipeError(f"{kind.__name__} has no field {sorted(unknown)}; known: {sorted(known)}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def _names(known: Iterable[type[PassConfig]]) -> str:
    return ", ".join(sorted(config.__name__ for config in known))
