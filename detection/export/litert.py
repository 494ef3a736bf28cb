PACKAGES = ("litert-torch",)
def variants(model, options):
    yield from ()
