"""`tenfold generate`: continue a prompt with any causal language model, and say how fast and at what cost in reads."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from ..cache_arguments import CacheRequest, add_cache_arguments, cache_request
from ..table_storage import STORAGES, table_storage


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = argparse.ArgumentParser(prog="tenfold generate", description=__doc__)
    parser.add_argument("--model", required=True, help="model folder, checkpoint file, hub id or asset:NAME")
    parser.add_argument("--prompt", help="text to continue; standard input by default")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the tokenizer's chat template")
    parser.add_argument("--tokenizer", help="tokenizer folder, hub id or asset:NAME; the model's own by default")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest continuation in tokens (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (the default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of probability (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (0)")
    parser.add_argument("--device", default=None, help="cuda where there is one, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto is float32 on a CPU, else as stored",
    )
    parser.add_argument(
        "--storage",
        choices=STORAGES,
        help="where MoLE's table is read from: memory, page-locked memory, a memory map (the default), or the device "
        "past the file cache; MemoryFormer's stored tables: memory or mmap keep them off the device",
    )
    add_cache_arguments(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = parser().parse_args(argv)
    import time

    import torch
    from transformers import TextStreamer

    from ...inference.evals.loading import pick_device
    from ..model_source import load_source, source_tokenizer

    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is below 1")
    request = cache_request(args)
    device = pick_device(args.device)
    with table_storage(args.storage):
        source = load_source(args.model, dtype=args.dtype, device=device)
    model, tokenizer = source.model, source_tokenizer(source, args.tokenizer)
    if args.storage:
        if not hasattr(model, "use_storage"):
            raise ValueError(
                f"--storage {args.storage}: {args.model} is not a lookup form and has no stored tables; export one, or "
                f"leave it out"
            )
        model.use_storage(args.storage)
    table = getattr(getattr(model, "model", None), "table", None)
    prompt = args.prompt if args.prompt is not None else sys.stdin.read()
    if args.chat:
        if not tokenizer.chat_template:
            raise ValueError(f"--chat: the tokenizer of {args.model} has no chat template; leave --chat out")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=not args.chat).input_ids
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError("the prompt is empty; write at least one token")
        ids = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id]])
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + args.max_new_tokens > limit:
        raise ValueError(
            f"the prompt has {ids.shape[1]} tokens; with {args.max_new_tokens} more it passes the model's {limit} "
            f"positions; shorten one of them"
        )
    sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p}
    cached, cache = _caching(request, model)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    out = model.generate(
        ids.to(device),
        attention_mask=torch.ones_like(ids, device=device),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **cached(TextStreamer(tokenizer, skip_special_tokens=True)),
        **(sampling if args.temperature > 0 else {"do_sample": False}),
    )
    seconds = time.perf_counter() - start
    new = out.shape[1] - ids.shape[1]
    cost = f"{new} tokens in {seconds:.2f} s, {new / seconds:.1f} tokens/s"
    if table is not None:
        cost += f", {table.bytes_read:,} bytes read from the table ({table.row_bytes:,} per token), {table.storage}"
    print(cost, file=sys.stderr)
    if request is not None:
        from ...inference.specache import add_facts, cache_facts, facts_line

        facts = cache_facts(cache, model.config, model.dtype, device=model.device.type)
        print(f"cache {request.name}: {facts_line(add_facts([facts]))}", file=sys.stderr)
    return 0


def _caching(request: CacheRequest | None, model: Any) -> tuple[Callable[[Any], dict[str, Any]], Any]:
    """What `generate` is given for a streamer and a cache, and the cache."""
    if request is None:
        return lambda streamer: {"streamer": streamer}, None
    from functools import partial

    from ...inference.specache import build_cache

    cache, arguments = build_cache(request.name, model.config, **request.options)
    if "custom_generate" not in arguments:
        return lambda streamer: {"streamer": streamer, **arguments}, cache
    loop = arguments["custom_generate"]
    # `generate` does not hand its streamer on to a decoding loop
    return lambda streamer: {
        **arguments,
        "streamer": streamer,
        "custom_generate": partial(loop, streamer=streamer),
    }, cache
