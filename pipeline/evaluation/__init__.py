"""Exams: questions, answers, scores, and what changed."""
