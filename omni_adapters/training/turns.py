"""Where sound, question and answer stand in one row of tokens.

    chat    <|bos|><|user_start|> SOUND question <|user_end|><|assistant_start|> answer <|assistant_end|>
    plain   <|bos|> SOUND answer <|bos|>

Only `answer` and the token that ends it are graded. `reading` has the transcript's tokens where SOUND stands: the same
question to a GPT that reads, which is the text oracle in validation and the teacher in distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from omni_adapters.data.collate import collate
from omni_adapters.shapes import BadInput
from omni_adapters.training.hosts import Tokenizer

Row = Mapping[str, Any]


class Turns:
    """Rows of a manifest → tokens. `insert_at` is what OmniGPT takes: SOUND stands before that text position.

    A row's question and answer are its keys of those names; without them the question is `question`, the answer the text.
    The plain form has no place for a question: BadInput.
    """

    def __init__(self, tokenizer: Tokenizer, form: Literal["chat", "plain"] = "chat", question: str = "") -> None:
        if form not in ("chat", "plain"):
            raise BadInput("Turns", f"form {form!r}", "'chat' or 'plain'")
        special = tokenizer.encode_special
        self.tokenizer, self.form, self.question = tokenizer, form, question
        if form == "chat":
            self.before = [special("<|bos|>"), special("<|user_start|>")]
            self.after = [special("<|user_end|>"), special("<|assistant_start|>")]
            self.end = special("<|assistant_end|>")
        else:
            self.before, self.after, self.end = [special("<|bos|>")], [], special("<|bos|>")
        self.insert_at = len(self.before)

    def prompt(self, row: Row, transcript: str = "") -> list[int]:
        """Everything before the answer; `transcript` goes where the sound would."""
        question = text_of(row, "question", self.question)
        if question and self.form == "plain":
            raise BadInput("Turns", f"the question {question!r:.80} in the plain form", "rows without a question",
                           "use the chat form")
        between = "\n".join(part for part in (transcript, question) if part)
        return self.before + (self.tokenizer.encode(between) if between else []) + self.after

    def reading(self, row: Row) -> list[int]:
        return self.prompt(row, text_of(row, "text", ""))

    def answer(self, row: Row) -> list[int]:
        return [*self.tokenizer.encode(answer_of(row)), self.end]

    def batch(self, rows: Sequence[Row], *, read: bool = False) -> tuple[Tensor, Tensor]:
        """idx (B, T) and targets (B, T) int64, −1 where not graded; `read` for rows without sound, the transcript inside."""
        parts = [self.parts(row, read) for row in rows]
        return collate([prompt + answer for prompt, answer in parts], pad_id=self.before[0],
                       num_prompt=[len(prompt) for prompt, _ in parts])

    def parts(self, row: Row, read: bool) -> tuple[list[int], list[int]]:
        """Prompt and answer; what the tokenizer refuses is named by the row's audio."""
        try:
            return self.reading(row) if read else self.prompt(row), self.answer(row)
        except BadInput as error:
            raise BadInput(f"{error.where}, row of {row.get('audio')}", error.came, error.expected, error.todo) from error


def answer_of(row: Row) -> str:
    """What the row's answer is; without one, its transcript."""
    return text_of(row, "answer", row["text"])


def text_of(row: Row, key: str, otherwise: str) -> str:
    """A row's text under `key`; `otherwise` where it has none, or null. Raises BadInput for anything but text."""
    value = row.get(key)
    if value is None:
        return otherwise
    if not isinstance(value, str):
        raise BadInput("Turns", f"{key} = {value!r:.80}", "a text, or none")
    return value
