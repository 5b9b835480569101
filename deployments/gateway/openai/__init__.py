"""The OpenAI API: request types, answers and their streams. Knows nothing about HTTP sockets, keys or Ray."""
