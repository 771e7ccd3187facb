#pragma once

using __half = _Float16;

inline float __half2float(__half value) { return float(value); }
inline __half __float2half(float value) { return __half(value); }
