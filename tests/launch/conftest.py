"""Data that runs of the launcher's tests may read."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.token_files import write_tokenizer, write_tokens


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """A tokenizer of 300 tokens and 2000 tokens written with it, as variables."""
    tokenizer = write_tokenizer(tmp_path / "tok")
    prefix = write_tokens(tmp_path / "mine", np.arange(2000) % 300, tokenizer)
    return {"DATASET_PATH": prefix, "TOKENIZER": tokenizer.path, "EVAL_ITERS": "0"}
