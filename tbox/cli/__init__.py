"""The thin commands: parse, call, print. No decision is made here."""
