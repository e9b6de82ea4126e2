"""The one error a person sees before a run starts: what is wrong, why, and what to type instead."""


class PreflightError(ValueError):
    """A mistake in the variables of a run. Its text has three parts; the launcher prints it and exits with code 2."""

    def __init__(self, what: str, why: str, try_: str) -> None:
        self.what, self.why, self.try_ = what, why, try_
        super().__init__(f"{what}\n  why: {why}\n  try: {try_}")

    @classmethod
    def of(cls, error: ValueError) -> "PreflightError":
        """The same error from a ValueError whose text already has the three parts."""
        what, _, rest = str(error).partition("\n  why: ")
        why, _, try_ = rest.partition("\n  try: ")
        assert why and try_, f"not a three-part error: {error}"
        return cls(what, why, try_)
