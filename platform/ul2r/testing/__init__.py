"""What tests are made of, here and in users' own projects: processes, texts, stores, models, recipes."""
