"""The system to beat where words are asked for: a recogniser writes down what it hears, and the GPT reads that.

pocketsphinx (CMU Sphinx; semi-continuous HMMs, an English trigram model, all within its wheel) runs on a CPU without a download.

Notable:
- A transcript depends on its waveform alone: features are normalised over the whole clip (`cmn="batch"`), and the front end,
  whose noise estimate would otherwise remember the clip before, is made anew for each clip.
- The waveform is scaled to one peak and goes in as 16-bit samples: a soft voice keeps its bits.
- A clip takes about as long as it lasts, and Python's lock is held meanwhile: processes share the clips, and a waveform that
  comes again is not recognised again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from omni_adapters.processes import worker_pool
from omni_adapters.shapes import BadInput, MissingExtra
from omni_adapters.training.hosts import Tokenizer

RECOGNISER_RATE = 16_000  # Hz, of pocketsphinx's English model
PEAK = 0.9  # of full scale

Recognise = Callable[[Sequence[bytes]], list[str]]


class Cascade:
    """Waveforms at 16 kHz → transcripts, each distinct waveform recognised once.

    recognise: clips of 16-bit samples → their texts; default pocketsphinx in `num_workers` processes, which live until `close`
    (or the end of a `with` block). In a script of your own that needs the `if __name__ == "__main__":` of `multiprocessing`;
    num_workers = 0 recognises in this process. Raises MissingExtra at once where pocketsphinx is not installed.
    """

    def __init__(self, recognise: Recognise | None = None, *, num_workers: int = 2) -> None:
        self.known: dict[str, str] = {}
        self.open = ExitStack()
        if recognise is None:
            find_pocketsphinx()
        self.pool = self.open.enter_context(worker_pool(num_workers)) if recognise is None and num_workers else None
        self.recognise = recognise or self.with_pocketsphinx

    def __call__(self, waveforms: Sequence[npt.NDArray[np.floating[Any]]]) -> list[str]:
        """Texts as the recogniser writes them: lower case, words between blanks, empty where it hears none."""
        clips = [samples_of(waveform) for waveform in waveforms]
        names = [hashlib.sha256(clip).hexdigest() for clip in clips]
        new = {name: clip for name, clip in zip(names, clips) if name not in self.known}
        self.known |= dict(zip(new, self.recognise(list(new.values())))) if new else {}
        return [self.known[name] for name in names]

    def with_pocketsphinx(self, clips: Sequence[bytes]) -> list[str]:
        return list(self.pool.map(recognised, clips)) if self.pool else [recognised(clip) for clip in clips]

    def __enter__(self) -> Cascade:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.open.close()


def samples_of(waveform: npt.NDArray[np.floating[Any]]) -> bytes:
    """(T,) float → 16-bit samples of the machine's byte order, the loudest at PEAK; silence stays silence."""
    if waveform.ndim != 1 or not len(waveform) or not np.isfinite(waveform).all():
        raise BadInput("Cascade", f"a waveform of shape {waveform.shape}", "(T,) finite samples, at least one")
    peak = float(np.abs(waveform).max())
    return np.rint(waveform * (32767 * PEAK / peak if peak else 0.0)).astype(np.int16).tobytes()


def recognised(clip: bytes) -> str:
    """What pocketsphinx hears in 16-bit samples at 16 kHz; a function of `clip` alone."""
    decoder = pocketsphinx_decoder()
    decoder.reinit_feat()
    decoder.start_utt()
    decoder.process_raw(clip, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return "" if found is None else str(found.hypstr)


@cache
def pocketsphinx_decoder() -> Any:
    """One for each process: its models take most of a second to load."""
    return find_pocketsphinx().Decoder(samprate=RECOGNISER_RATE, cmn="batch", loglevel="FATAL")


def find_pocketsphinx() -> Any:
    try:
        import pocketsphinx
    except ImportError as error:
        raise MissingExtra("the cascade", "pocketsphinx", "eval") from error
    return pocketsphinx


def readable(tokenizer: Tokenizer, text: str) -> tuple[str, int]:
    """The words that the tokenizer can write, and how many it cannot: one of whole words refuses those it never saw."""
    words = text.split()
    kept = [word for word in words if _encodes(tokenizer, word)]
    return " ".join(kept), len(words) - len(kept)


def _encodes(tokenizer: Tokenizer, word: str) -> bool:
    try:
        return bool(tokenizer.encode(word))
    except BadInput:
        return False
