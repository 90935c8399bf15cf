"""Building blocks of tests, here and in users' own projects: processes, texts, stores, models, recipes."""
