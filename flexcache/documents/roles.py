"""Roles of the columns of documents: id, input of the model, labels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from flexcache.errors import DocumentsError, nearest

RESERVED = (
    *("id", "text", "tokens", "messages_xxh3_128", "image_xxh3_128", "token_id", "position", "document"),
    *("source_index", "n_tokens", "row_start", "n_rows"),
)
"""Names that a label cannot have; ``text`` is allowed if the input is tokens or images."""
ONE_TYPE = "write it in one type throughout, or leave it out by flexcache.open_documents(…, labels=[…])"
"""The remedy for a column with values of several types."""


@dataclass(frozen=True)
class Roles:
    """The column names of a document's id, text, tokens, messages and image in the source.

    With *images_first*, an image is the input of all documents that have one.
    """

    id: str
    text: str | None
    tokens: str | None
    messages: str | None = None
    image: str | None = None
    images_first: bool = False

    @property
    def contents(self) -> dict[str, str]:
        """The columns that can be the input, by name, with their kinds."""
        kinds = {"text": self.text, "tokens": self.tokens, "messages": self.messages, "image": self.image}
        return {column: kind for kind, column in kinds.items() if column}

    def present(self, names: Collection[str]) -> list[str]:
        """Return the input of documents with these columns: one column, or none, or both text and tokens.

        A column that was named in place of a default comes before those with a default name. After that, text or tokens
        come before messages, and messages before images.

        >>> Roles("id", "text", "tokens", "messages", "image").present(["image", "messages", "text"])
        ['text']
        >>> Roles("id", "text", "tokens", "chat", "image").present(["text", "chat"])
        ['chat']
        """
        there = {column: kind for column, kind in self.contents.items() if column in names}
        if self.images_first and self.image in there:
            return [self.image]
        there = {column: kind for column, kind in there.items() if column != kind} or there
        plain = [column for column, kind in there.items() if kind in ("text", "tokens")]
        return plain or list(there)[:1]

    def filled(self, schema: pa.Schema) -> list[str]:
        """Return the columns; text or tokens that are null throughout are left out if there is another input."""
        null = [field.name for field in schema if pa.types.is_null(field.type)]
        left = [name for name in schema.names if name not in null or name not in (self.text, self.tokens)]
        return left if self.present(left) else list(schema.names)


def content_column(names: list[str], roles: Roles, where: str | None) -> str:
    """Return the column that is the input of documents with these columns; see `Roles.present`.

    Raises
    ------
    DocumentsError
        No column is, or both text and tokens are.
    """
    present = roles.present(names)
    if len(present) != 1:
        raise content_error(names, roles, where, both=len(present) == 2)
    return present[0]


def content_error(names: list[str], roles: Roles, where: str | None, *, both: bool) -> DocumentsError:
    """Return the error for a document, or a file, without input, or with both text and tokens."""
    wanted = list(roles.contents)
    found, expected = ", ".join(names) or "nothing", " or ".join(wanted)
    if both:
        keep = [name for name in names if name not in {roles.id, roles.text, roles.tokens, *RESERVED}]
        return DocumentsError(
            "there are both text and tokens",
            where=where,
            expected=expected,
            found=found,
            remedy=f"to read the text, give flexcache.open_documents(…, tokens=None, labels={keep}), as no label can be"
            " called 'tokens'; to read the tokens, flexcache.open_documents(…, text=None)",
        )
    if null := [role for role in wanted if role in names]:
        return DocumentsError(
            f"a document without {' or '.join(null)}: it is null",
            where=where,
            expected=expected,
            found="null",
            remedy="leave it out",
        )
    chats = [name for name in names if name in ("conversations", "conversation")]
    column = f"messages={chats[0]!r}), whose messages need role and content" if chats else "text='body')"
    name = f"name the column: flexcache.open_documents(…, {column}"
    remedy = f"{name}; {nearest(wanted[0], names)}" if names and wanted else None
    return DocumentsError("no text and no tokens", where=where, expected=expected, found=found, remedy=remedy)


def label_columns(
    names: Sequence[str],
    used: Collection[str],
    wanted: Sequence[str] | None,
    roles: Roles,
    content: str,
    where: str | None,
) -> list[str]:
    """Return the columns that are labels: the *wanted* ones, or all except the id and the input.

    Raises
    ------
    DocumentsError
        A name is that of a column of the store; or there is no such column, or it is named twice.
    """
    others = [name for name in names if name not in used]
    chosen = others if wanted is None else list(wanted)
    reserved = {*RESERVED} - ({"text"} if content in ("tokens", "image") else set())
    keep = [other for other in others if other not in reserved]
    for name in chosen:
        if name in reserved and name in others and name in (roles.text, roles.tokens) and content in ("text", "tokens"):
            raise content_error(list(names), roles, where, both=True)
        if name in reserved:
            raise DocumentsError(
                f"a label cannot be called {name!r}: the store has a column of that name",
                where=where,
                found=", ".join(names),
                remedy=f"rename the column, or choose the labels: flexcache.open_documents(…, labels={keep})",
            )
        if name not in others:
            raise DocumentsError(
                f"there is no label column {name!r}",
                where=where,
                remedy=nearest(name, others) if others else "there are no other columns",
            )
        if content == "image" and name == "image":
            raise DocumentsError(
                "a label cannot be called 'image' if the documents are images of another column",
                where=where,
                remedy="rename the column, or leave it out by flexcache.open_documents(…, labels=[…])",
            )
    if len(set(chosen)) < len(chosen):
        raise DocumentsError("a label is named twice", found=", ".join(chosen))
    return chosen
