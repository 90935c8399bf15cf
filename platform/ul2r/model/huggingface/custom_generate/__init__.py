"""The modules of an export's custom_generate folder; they need torch and transformers, and nothing else.

`model.generate(..., custom_generate=MODEL, trust_remote_code=True)` of transformers runs `generate` of generate.py in
place of its own. `ul2r.model.huggingface.companions` copies the modules, with imports of each other made relative, and
writes the model's own settings.py.
"""
