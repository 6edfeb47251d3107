// Brings what is worked on next into L2 line by line meanwhile: bursts would hold up the work, and
// pauses would idle the memory. Whoever works pays in its cycles, roughly.

constexpr int64_t kLineBytes = 64;

// A source's open(line, end) gives the next stretch of memory, false after the last; its lines()
// are how many there are in all.
template <class Source>
class Fetching {
public:
    Fetching(Source source, int64_t cycles) : source_(source) {
        if (int64_t lines = source.lines()) price_ = cycles / lines + 1;
    }

    void pay(int64_t cycles) {
        for (credit_ += cycles; credit_ >= price_; credit_ -= price_)
            if (!fetch_line()) return;
    }

    void end() {
        while (fetch_line()) continue;
    }

private:
    bool fetch_line() {
        constexpr int into_l2 = 2;
        if (line_ >= end_ && !source_.open(line_, end_)) return false;
        __builtin_prefetch(line_, 0, into_l2);
        line_ += kLineBytes;
        return true;
    }

    Source source_;
    const char *line_ = nullptr, *end_ = nullptr;
    int64_t credit_ = 0, price_ = INT64_MAX;
};
