"""Panels of `--help`, in the order in which it lists them."""

MAIN = "Main options"
FREEZING = "Freezing"
MODEL = "Backbone and head"
INPUT = "Preprocessing"
AUGMENTATION = "Augmentation"
OPTIMIZATION = "Optimization"
REGULARIZATION = "Regularization"
IMBALANCE = "Class imbalance"
AVERAGING = "Weight averaging and ensembles"
DISTILLATION = "Distillation"
DATA = "Data"
RUN = "Run and output"
MACHINE = "Machine"

PANELS = (
    MAIN, FREEZING, MODEL, INPUT, AUGMENTATION, OPTIMIZATION, REGULARIZATION, IMBALANCE, AVERAGING,
    DISTILLATION, DATA, RUN, MACHINE,
)  # fmt: skip
