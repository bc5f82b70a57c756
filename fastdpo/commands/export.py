"""``fastdpo export``: whether other programs take an adapter as it is."""

from __future__ import annotations

import argparse

from fastdpo.commands.models import check_models
from fastdpo.commands.terminal import SafeConsole
from fastdpo.errors import BAD_INPUT, UsageError, bad_input
from fastdpo.export.serving import Finding, check_llama_cpp, check_vllm, facts_of


def run(args: argparse.Namespace) -> int:
    """Run ``fastdpo export``.

    Args:
        args: of its parser.

    Returns:
        0, or 2 where something is refused.

    Raises:
        UsageError: the flags or the adapter cannot be used.
    """
    if not (args.check_vllm or args.check_llama_cpp):
        raise UsageError("check for what? --check-vllm, --check-llama-cpp, or both.")
    if args.max_lora_rank is not None and not args.check_vllm:
        raise UsageError("--max_lora_rank would have no effect without --check-vllm.")
    check_models([args.model], "")
    with bad_input():
        facts = facts_of(args.model)
    console = SafeConsole(soft_wrap=True)
    found: list[Finding] = []
    if args.check_vllm:
        found += _say("vLLM", check_vllm(facts, args.max_lora_rank), console)
    if args.check_llama_cpp:
        found += _say("llama.cpp", check_llama_cpp(facts), console)
    return BAD_INPUT if any(finding.is_refused for finding in found) else 0


def _say(program: str, findings: list[Finding], console: SafeConsole) -> list[Finding]:
    if not findings:
        console.print(f"{program}: takes it as it is.")
    refused = any(finding.is_refused for finding in findings)
    if findings:
        console.print(f"{program}: {'refuses it' if refused else 'takes it, and not all of it as it is'}.")
    for finding in findings:
        how = "refused" if finding.is_refused else "changed"
        console.print(f"  {how}: {finding.what}; {finding.happens}. What to do: {finding.help}.")
    return findings
