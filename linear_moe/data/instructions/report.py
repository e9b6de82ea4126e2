"""What became of the samples of a data set: counts, and what a person should know of them."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the samples."""

    source: list[str]
    """Files."""
    samples: int
    """Samples that are trained on."""
    tokens: int
    """Their tokens, as many as they take room in sequences."""
    learned_tokens: int
    """Those in the loss."""
    largest_token: int
    """Largest token: the model's embedding has to have its row."""
    longest: int
    """Room of the longest sample in the files, kept or not."""
    over_long: int
    """Samples longer than a sequence: dropped, or cut."""
    cut: int
    """Of them, those that were cut and kept."""
    empty_answers: int
    """Samples dropped because an answer is empty."""
    split: int
    """Conversations that became one sample for each answer, since the template writes earlier turns otherwise."""
    template: str | None = None
    """Chat template that was used, if it is not the tokenizer's own."""

    def notes(self, seq_length: int) -> list[str]:
        """What a person should know, one line each; nothing when every sample is used whole."""
        found, names = [], ", ".join(Path(path).name for path in self.source)
        read = self.samples + self.empty_answers + self.over_long - self.cut
        if self.empty_answers:
            found.append(
                f"{names}: {self.empty_answers} of {read} samples have an empty answer and are left out."
            )
        if self.over_long:
            lost = self.over_long - self.cut
            fate = f"{self.cut} are cut, and {lost} left out" if self.cut else "are left out"
            found.append(
                f"{names}: {self.over_long} of {read} samples are longer than SEQ_LEN={seq_length} and {fate}; "
                f"SEQ_LEN={self.longest} holds all"
            )
        if self.split:
            found.append(
                f"{names}: {self.split} conversation(s) became one sample for each answer, which repeats their "
                f"prompts: the chat template writes earlier turns otherwise than the last."
            )
        return found
