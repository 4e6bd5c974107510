"""Callbacks: `regraft.integrations.transformers` for Hugging Face Trainer, `regraft.integrations.lightning`.

Each loads its library when a callback is first asked for.
"""

from regraft.integrations import lightning as lightning
from regraft.integrations import transformers as transformers
