"""The query of the page, read from its URL and written to it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import urlencode

from starlette.datastructures import QueryParams

from fuselip_core.search.index import Filters
from fuselip_core.serving.engine import Query

FACETS = {"modality": "Modality", "concept": "Concept", "split": "Split", "source": "Source"}
MOST_SAID = 60  # characters of the query that the page repeats


@dataclass(frozen=True)
class Asked:
    """Words, pictures of the index by id, filters, and an uploaded picture; all but the upload are part of the URL."""

    words: str = ""
    ids: tuple[str, ...] = ()
    filters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    threshold: float | None = None
    after: str = ""  # date, YYYY-MM-DD
    hybrid: bool = False
    picture: bytes | None = None

    @classmethod
    def of_address(cls, given: QueryParams) -> Asked:
        """Reads URL parameters; ignores invalid values."""
        try:
            threshold = float(given.get("score", "nan"))
        except ValueError:
            threshold = math.nan
        try:
            after = datetime.fromisoformat(given.get("after", "")).date().isoformat()
        except ValueError:
            after = ""
        return cls(
            words=given.get("q", ""),
            ids=tuple(given.getlist("id")),
            filters={name: tuple(given.getlist(name)) for name in FACETS if name in given},
            threshold=threshold if -1 <= threshold <= 1 else None,
            after=after,
            hybrid=given.get("hybrid") == "1",
        )

    @property
    def address(self) -> str:
        """The page's URL with this query."""
        pairs = [("q", self.words)] if self.words else []
        pairs += [("id", name) for name in self.ids]
        pairs += [(name, value) for name, values in self.filters.items() for value in values]
        pairs += [("score", f"{self.threshold:g}")] if self.threshold is not None else []
        pairs += [("after", self.after)] if self.after else []
        pairs += [("hybrid", "1")] if self.hybrid else []
        return "/?" + urlencode(pairs) if pairs else "/"

    @property
    def query(self) -> Query:
        """This query for the engine."""
        after = datetime.fromisoformat(self.after) if self.after else None
        modality, concept, split, source = (self.filters.get(name, ()) for name in FACETS)
        filters = Filters(modality, concept, split, source, indexed_after=after)
        return Query(self.words or None, self.picture, self.ids, filters, threshold=self.threshold, hybrid=self.hybrid)

    @property
    def said(self) -> str:
        """The query in words, without its filters."""
        words = self.words.strip()
        parts = ["the picture"] if self.ids or self.picture else []
        parts += [f"“{textwrap.shorten(words, MOST_SAID, placeholder=' …')}”"] if words else []
        return " with ".join(parts)

    @property
    def is_empty(self) -> bool:
        """Whether there are neither words nor a picture."""
        return not (self.words.strip() or self.ids or self.picture)
