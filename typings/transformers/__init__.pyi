"""The names of transformers that src/ imports from the package itself, each from its own module.

The package's own `__init__` imports every model for a type checker: pyright spends two thirds of its time on that.
Classes that are chosen by a checkpoint's configuration have no type.
"""

from typing import Any

from transformers.cache_utils import Cache as Cache
from transformers.models.llama.configuration_llama import LlamaConfig as LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM as LlamaForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast as PreTrainedTokenizerFast
from transformers.trainer import Trainer as Trainer
from transformers.trainer_callback import ProgressCallback as ProgressCallback
from transformers.trainer_callback import TrainerCallback as TrainerCallback
from transformers.trainer_utils import set_seed as set_seed
from transformers.training_args import TrainingArguments as TrainingArguments
from transformers.utils import logging as logging

__version__: str
AutoConfig: Any
AutoModelForCausalLM: Any
AutoModelForImageTextToText: Any
AutoModelForSeq2SeqLM: Any
AutoTokenizer: Any
