#!/usr/bin/env python3
"""`python train.py` is `fairseq-train`."""

from fairseq_cli._commands import train

if __name__ == "__main__":
    train()
