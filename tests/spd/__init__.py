"""Tests of elision.spd."""
