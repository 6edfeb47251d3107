// The kernels of an instruction set that has vectors only.
#include "math.inl"
#include "pointwise.inl"
#include "product.inl"
#include "linear.inl"
#include "fetching.inl"
#include "attention.inl"
#include "few_rows.inl"

void linear(const LinearArgs &args) {
    args.dtype == kBfloat16 ? linear_of<bf16>(args) : linear_of<float>(args);
}

void attention(const AttentionArgs &args) {
    args.dtype == kBfloat16 ? attention_of<bf16>(args) : attention_of<float>(args);
}
