"""What is read off activations and a model's passes without changing it. Read `directions` first, then `probes`.

- `directions`: difference in means, projections, cosines, how far a direction sets two kinds of prompts apart.
- `probes`: linear classifiers by layer on a leak-free split, with controls.
- `rotations`: the orthogonal map from one model's activations to another's, and whether it is needed.
- `subspaces`: principal angles, leading directions that data sets share, erosion between base and instruct.
- `neurons`: neurons that differ, safety neurons, the shift of activation in fine-tuning.
- `lens`: what each layer would answer.
- `contributions`: what each head and MLP adds to the answer.
- `writes`: what heads and modules add to the residual stream where a norm stands between.
- `attention`: where heads look.
- `likelihood`: how likely a completion is, and how far two models' predictions part.
- `gradients`: which way examples would pull a weight, and how alike they are.

Private: `_linear` (float64 algebra on captured tensors), `_head_map` and `_gradient_cosines`.
"""
