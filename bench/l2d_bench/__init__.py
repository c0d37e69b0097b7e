"""The papers' tables, declared in files and run in one command."""
