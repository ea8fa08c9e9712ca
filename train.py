#!/usr/bin/env python3
"""`python train.py` is `fairseq-train`."""

from fairseq_cli.train import cli_main

if __name__ == "__main__":
    cli_main()
