"""Families of LALMs that are driven otherwise than their classes' accessors say."""
