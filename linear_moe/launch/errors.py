"""The one error a person sees before a run starts: what is wrong, why, and what to type instead."""


class PreflightError(ValueError):
    """A mistake in the variables of a run.

    Its text has three parts. The launcher prints any ValueError that has them, and exits with code 2.
    """

    def __init__(self, what: str, why: str, try_: str) -> None:
        self.what, self.why, self.try_ = what, why, try_
        super().__init__(f"{what}\n  why: {why}\n  try: {try_}")
