from contextlib import contextmanager
def last_words(error): return str(error)
@contextmanager
def clear_failures(config, app):
    yield
