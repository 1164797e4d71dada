"""How well a model listens: suites of questions, and what their answers are worth."""
