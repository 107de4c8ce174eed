"""Losses inside other people's training code; nothing here imports a framework."""
